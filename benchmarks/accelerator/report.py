"""The page and the plots of accelerator.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.page import STEP_COLUMNS, step_cells
from benchmarks.steps import Step
from deqcore.bench import plots, report
from deqcore.bench.rows import BenchRow
from deqcore.bench.timing import Spread

COMMAND: Final = "python -m benchmarks.accelerator --out docs/benchmarks"
CASE_COLUMNS: Final = (*report.COLUMNS, "host waits")
NATIVE_COLUMNS: Final = ("problem", "solver", "ms, native", "ms, portable", "portable / native", "waits", "memory")
WORK_COLUMNS: Final = (
    "vectors",
    "steps",
    "held",
    "least MB",
    "ms (quartiles)",
    "GB/s",
    "share of the copy",
    "native",
    "ms of all",
)
COST_COLUMNS: Final = ("steps", "f, ms", "solver", "ms per call", "ms per step")
SHOWN: Final = (1, 5, 10, 20, 24)
STEPS: Final = {"steps": "native", "steps-portable": "portable"}
NOTES: Final = """\
- *residual*: ‖f(z) − z‖ / ‖f(z)‖ of the state that each library returns, per sample, its norms in float64 on the
  device; f is evaluated in the state's dtype. A library with a stopping rule of its own gets the loosest tolerance with
  which every sample reaches it.
- *ms*: wall time from the call until the device is done; *ms per f*: ten evaluations in a row, then one wait, divided
  by ten. *overhead*: seconds / (evaluations × seconds per f). Where f is small, both are the time of launching kernels.
- *memory*: what tensors took beyond those from before, at most (`max_memory_allocated`), in states.
- *host waits*: operations of one solve that make the host wait for the device, as `set_sync_debug_mode` tells.
- *native* and *portable*: processes without and with `DEQCORE_NATIVE=0`.
- Contenders take turns within each round; figures are medians, quartiles in parentheses. Compilation and first calls
  stand apart (*first call*).
- A step's own work: CUDA events around a Broyden step and around its f (`addcmul`), which is taken off. *least MB*: the
  bytes that no version can do without, for a step that begins with k vectors held: 2k + 2 vectors of the history's
  dtype, 4 of the state's (see `least_bytes`); *GB/s* is their number over the time, beside a copy's bytes read and
  written per second; *native*: how many steps had a native version; *ms of all*: wall time of the whole solve with f,
  per step, which is longer where the host is slower than the device."""
Items = Mapping[str, Mapping[str, Any]]


def write(results: Mapping[str, Any], out: Path) -> None:
    """Write accelerator.md, and the plots where matplotlib is installed."""
    parts: Mapping[str, Items] = results["parts"]
    text = ["# On an accelerator", *_opening(results)]
    pictures = _plots(parts, out) if plots.available() else {}
    shown = {name: f"![{caption}]({name})" for name, caption in pictures.items()}
    if rows := rows_of(parts, "cases"):
        text += ["## Solvers and peers", _notes(parts["cases"]), report.markdown(map(_cells, rows), CASE_COLUMNS)]
        text += [shown[name] for name in shown if name.endswith("overhead.png")]
    if pairs := list(_effects(parts)):
        text += ["## What native steps change", report.markdown(pairs, NATIVE_COLUMNS)]
    if work := list(_work(parts)):
        text += ["## A Broyden step's own work", _copied(parts), report.markdown(work, WORK_COLUMNS)]
        text += [shown[name] for name in shown if name.endswith("bandwidth.png")]
    if costs := list(_costs(parts)):
        text += ["## The fixed cost, f next to nothing (tanh cell, 4×16)", report.markdown(costs, COST_COLUMNS)]
    for name, result in parts.get("training", {}).items():
        if result.get("steps"):
            steps = step_cells([Step.of(step) for step in result["steps"]])
            text += [f"## A training step ({name}, float32 without TF32)", report.markdown(steps, STEP_COLUMNS)]
    if rows := rows_of(parts, "jax"):
        text += ["## JAX (compiled, products in full float32)", _notes(parts["jax"])]
        text += [report.markdown(map(_cells, rows), CASE_COLUMNS)]
    if failed := failures(results):
        text += ["## Not measured", "\n".join(f"- {line}" for line in failed)]
    text += ["## How it was measured", NOTES]
    (out / "accelerator.md").write_text("\n\n".join(text) + "\n")


def failures(results: Mapping[str, Any]) -> list[str]:
    """Return what could not be measured, and why: parts, contenders, layers."""
    result: dict[tuple[str, str], list[str]] = {}
    for part, items in results["parts"].items():
        for name, item in items.items():
            where = f"{part}, {name}"
            if "error" in item:
                result[where, item["error"]] = []
            raised = {row["contender"]: row["error"] for row in item.get("rows", ()) if row["error"]}
            for who, why in (raised | item.get("failed", {})).items():
                result.setdefault((where, why), []).append(who)
    return [": ".join(filter(None, (where, ", ".join(who), why))) for (where, why), who in result.items()]


def rows_of(parts: Mapping[str, Items], part: str) -> list[Mapping[str, Any]]:
    """Return all rows of a part."""
    return [row for item in parts.get(part, {}).values() for row in item.get("rows", ())]


def _opening(results: Mapping[str, Any]) -> list[str]:
    lines = [f"Written by `{COMMAND}`; the numbers behind it are in `accelerator.json`."]
    if results["device"] != "cuda":
        lines.append(f"**Measured on the device {results['device']!r}: a trial of the program, no result.**")
    if results["quick"]:
        lines.append("**Measured with `--quick`: small problems and few rounds, a first look and no result.**")
    before = results["parts"].get("device", {}).get("before", {})
    loaded = results["parts"].get("steps", {}).get("copy", {}).get("clocks under load", {})
    if "name" in before:
        clocks = [
            f"{each['clocks.sm']} {when} "
            f"(memory {each['clocks.mem']}, {each['power.draw']}, {each['temperature.gpu']} °C)"
            for each, when in ((before, "before"), (loaded, "while copying"))
            if "clocks.sm" in each
        ]
        driver = f", driver {before['driver_version']}" if "driver_version" in before else ""
        limit = f", power limit {before['power.limit']}" if "power.limit" in before else ""
        lines.append(
            f"{before['name']}, {before['memory_gib']} GiB, {before['multiprocessors']} multiprocessors{driver}, "
            f"CUDA {before['cuda']}{limit}; clock as found: {', '.join(clocks) or 'unknown'}."
        )
    if "tf32" in before:
        said = ", ".join(f"{what} {'on' if on else 'off'}" for what, on in before["tf32"].items())
        lines.append(
            f"TF32 in torch's own default: {said}. The cases say TF32 where it is on; without it products are float32."
        )
    lines.append(report.machine_text(results["machine"]))
    lines.append(f"Commit {results['commit']}; {results.get('seconds', 0):.0f} s in all.")
    return lines


def _notes(items: Items) -> str:
    return "\n".join(f"- *{name}*: {item['note']}." for name, item in items.items() if "note" in item)


def _cells(plain: Mapping[str, Any]) -> dict[str, str]:
    waits = plain.get("waits")
    return report.cells(BenchRow.of(plain)) | {"host waits": "" if waits is None else str(waits)}


def _effects(parts: Mapping[str, Items]) -> Iterator[dict[str, str]]:
    """Yield the rows timed both ways."""
    without = {(row["case"], row["contender"]): row for row in rows_of(parts, "cases-portable") if row["seconds"]}
    for row in rows_of(parts, "cases"):
        other = without.get((row["case"], row["contender"]))
        if other is None or not row["seconds"]:
            continue
        ms, beside = (Spread.of([1e3 * item for item in which["seconds"]]) for which in (row, other))
        yield {
            "problem": row["case"],
            "solver": row["contender"],
            "ms, native": report.spread(ms),
            "ms, portable": report.spread(beside),
            "portable / native": f"{beside.median / ms.median:.2f}",
            "waits": f"{row.get('waits')} / {other.get('waits')}" if row.get("waits") is not None else "",
            "memory": " / ".join(f"{item['memory'] / item['state']:.1f}" for item in (row, other) if item["memory"]),
        }


def _rate(parts: Mapping[str, Items], part: str) -> float | None:
    """Return the bytes per second of the copy in the process of this part."""
    result = parts.get(part, {}).get("copy", {}).get("median")
    return None if result is None else float(result)


def _copied(parts: Mapping[str, Items]) -> str:
    rates = {how: _rate(parts, part) for part, how in STEPS.items()}
    result = [f"{rate / 1e9:.0f} GB/s beside the {how} steps" for how, rate in rates.items() if rate]
    return f"A copy on the device, bytes read and written: {', '.join(result) or 'not measured'}."


def _work(parts: Mapping[str, Items]) -> Iterator[dict[str, str]]:
    for vectors in dict.fromkeys(name for part in STEPS for name in parts.get(part, {})):
        for part, how in STEPS.items():
            item = parts.get(part, {}).get(vectors, {})
            for point in item.get("points", ()):
                if point["held"] not in SHOWN:
                    continue
                ms = Spread.of([1e3 * entry for entry in point["seconds"]])
                rate, copy = point["bytes"] / (1e-3 * ms.median), _rate(parts, part)
                yield {
                    "vectors": vectors,
                    "steps": how,
                    "held": str(point["held"]),
                    "least MB": f"{point['bytes'] / 1e6:.4g}",
                    "ms (quartiles)": report.spread(ms),
                    "GB/s": f"{rate / 1e9:.0f}",
                    "share of the copy": f"{rate / copy:.0%}" if copy else "",
                    "native": f"{item['native']} of {item['of']}",
                    "ms of all": f"{1e3 * Spread.of(item['wall']).median:.3g}",
                }


def _costs(parts: Mapping[str, Items]) -> Iterator[dict[str, str]]:
    for part, how in STEPS.items():
        facts = parts.get(part, {}).get("fixed cost", {}).get("facts", {})
        for solver, result in facts.items():
            if solver != "f":
                yield {
                    "steps": how,
                    "f, ms": f"{facts['f']['ms']:.3f}",
                    "solver": solver,
                    "ms per call": f"{result['ms per call']:.3f}",
                    "ms per step": f"{result['ms per step']:.3f}",
                }


def _plots(parts: Mapping[str, Items], out: Path) -> dict[str, str]:
    """Draw all; returns captions by file name."""
    made: dict[str, str] = {}
    rows = [BenchRow.of(row) for row in rows_of(parts, "cases")]
    if any(row.seconds for row in rows):
        file = "accelerator-overhead.png"
        made[file] = "Overhead of each solver on the device"
        plots.overheads(rows, out / file, made[file])
    lines = {
        f"{vectors}, {how}": item["points"]
        for part, how in STEPS.items()
        for vectors, item in parts.get(part, {}).items()
        if item.get("points")
    }
    if lines:
        file = "accelerator-bandwidth.png"
        made[file] = "Bytes that a Broyden step must move over its time, by vectors held"
        _bandwidth(lines, _rate(parts, "steps"), out / file, made[file])
    return made


def _bandwidth(lines: Mapping[str, Any], copy: float | None, path: Path, title: str) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.6))
    names = list(dict.fromkeys(name.rpartition(", ")[0] for name in lines))
    for name, points in lines.items():
        vectors, _, how = name.rpartition(", ")
        rates = [1e-9 * point["bytes"] / Spread.of(point["seconds"]).median for point in points]
        style = {"color": f"C{names.index(vectors)}", "linestyle": "-" if how == "native" else "--"}
        axes.plot([point["held"] for point in points], rates, **style, label=name)
    if copy:
        axes.axhline(copy / 1e9, color="0.4", linewidth=1, label="copy on the device")
    axes.set_xlabel("vectors held when the step begins")
    axes.set_ylabel("GB/s")
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False, fontsize=8)
    figure.savefig(path, dpi=plots.DPI, bbox_inches="tight")
    plt.close(figure)
