(() => {
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  document.documentElement.classList.add("js");
  const key = (row, column) => {
    const cell = row.cells[column], text = cell.textContent.trim();
    const given = cell.dataset.value;
    return given !== undefined ? (given === "" ? null : Number(given)) : text === "" || text === "–" ? null : text;
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number"
    ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  for (const table of all("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    heads.forEach((head, column) => {
      head.tabIndex = 0;
      const sort = () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...body.rows].map((row) => [key(row, column), row]);
        // What was not measured stays last in both directions.
        rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : (up ? 1 : -1) * compare(a, b));
        body.append(...rows.map(([, row]) => row));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => {
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
      });
    });
  }
  const hints = () => all(".hint").forEach((hint) => {
    const table = hint.nextElementSibling;
    hint.classList.toggle("shown", table.scrollWidth > table.clientWidth + 1);
  });
  addEventListener("resize", hints);
  hints();
  const box = document.createElement("div");
  box.id = "tip";
  document.body.append(box);
  const hide = () => { box.style.display = "none"; };
  for (const chart of all("figure svg")) {
    const points = all(".tip", chart).map((point) => {
      const title = point.querySelector("title"), text = title.textContent;
      title.remove(); // the box replaces the browser's own, late tooltip
      return { point, text };
    });
    const show = (event) => {
      let best = null, least = 28;
      for (const { point, text } of points) {
        const place = point.getBoundingClientRect();
        const x = place.x + place.width / 2, y = place.y + place.height / 2;
        const distance = Math.hypot(event.clientX - x, event.clientY - y);
        if (distance < least) { least = distance; best = { x, y, text }; }
      }
      if (!best) { hide(); return; }
      box.textContent = best.text;
      box.style.display = "block";
      box.style.left = `${Math.max(4, Math.min(best.x + 10, innerWidth - box.offsetWidth - 4))}px`;
      box.style.top = `${Math.max(4, best.y - box.offsetHeight - 10)}px`;
    };
    chart.addEventListener("pointermove", show);
    chart.addEventListener("pointerdown", show);
    chart.addEventListener("pointerleave", hide);
  }
})();
