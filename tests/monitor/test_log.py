"""Reading logs: whole, growing, torn, and other files; the terminal view and the page made of one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import deqcore
from deqcore.errors import MissingExtraError, MonitorError
from deqcore.monitor import Event, Metric, Metrics, Monitor, Row, RunInfo
from deqcore.monitor.live import live_view, sparkline
from deqcore.monitor.log.format import header, line
from deqcore.monitor.log.reader import Tail, read
from deqcore.monitor.metrics import COUNTERS, STANDARD
from deqcore.monitor.report import draw, load, render, settings, table, tiles, verdict

RUN = RunInfo(Metrics([Metric("my_loss", "nats", "Loss.")]), 1000.0, {"backend": "auto", "note": "<b>bold</b>"})
EVIL = "<script>alert('x')</script>"


def rows(count: int, name: str = "") -> list[Row]:
    return [
        Row(
            step,
            step,
            1000.0 + step,
            {
                "deq_forward_steps": 5.0 + step % 3,
                "deq_forward_residual_max": 10.0 ** -(1 + step % 5),
                "deq_unconverged_fraction": 0.0,
                "my_loss": 1.0 / (1 + step),
            },
            name,
        )
        for step in range(count)
    ]


def write(path: Path, *records: Row | Event) -> Path:
    path.write_text("\n".join([header(RUN), *map(line, records)]) + "\n", encoding="utf-8")
    return path


def shown(renderable: object, width: int = 120) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_a_log_comes_back_as_it_was_written(tmp_path) -> None:
    event = Event(1, 1001.0, "fired", "text", "deq_forward_steps", 5.0, "warn")
    log = read(write(tmp_path / "a.jsonl", *rows(3), event))
    assert log.rows == rows(3)
    assert log.events == [event]
    assert log.units["my_loss"] == "nats"
    assert log.runs == 1
    assert not log.problems
    assert log.solves == 3


def test_a_second_run_in_the_same_file_is_shown_alone_unless_it_goes_on(tmp_path) -> None:
    old = Event(2, 1001.0, "retrain", "of the earlier run")
    path = write(tmp_path / "a.jsonl", *rows(3), old)
    more = [line(replace(row, step=row.step + 3)) for row in rows(2)]
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join([header(RUN), *more]) + "\n")
    log = read(path)
    assert [row.step for row in log.rows] == [0, 1, 2, 3, 4]
    assert (log.runs, log.left_out, log.retrain) == (2, 0, old)
    assert "left out" not in render(log) + shown(live_view(log, 10))
    with path.open("a", encoding="utf-8") as file:
        file.write("\n".join([header(RUN), *map(line, rows(2))]) + "\n")
    log = read(path)
    assert [row.step for row in log.rows] == [0, 1]
    assert (log.runs, log.left_out, log.retrain, log.events) == (3, 2, None, [])
    assert "2 earlier run(s) in this file left out" in render(log)
    assert "2 earlier run(s) in this file left out" in " ".join(
        shown(live_view(log, 10)).split()
    )  # wrapped where it is long


def test_a_truncated_last_line_is_reported_and_costs_only_itself(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", *rows(3))
    path.write_bytes(path.read_bytes()[:-20])
    log = read(path)
    assert log.rows == rows(2)
    assert log.problems == ["Line 4, the last one, is torn: the process was stopped in mid-write."]
    assert "Line 4" in shown(live_view(log, 10))
    assert "Line 4" in render(log)


def test_bad_lines_inside_are_left_out_and_reported(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", *rows(2))
    with path.open("ab") as file:
        file.write(b'{"kind": "row", "step": 1}\n\xff\xfe\n[1]\n\n')
        file.write(line(rows(3)[2]).encode() + b"\n")
    log = read(path)
    assert log.rows == rows(3)
    assert [problem.split(" was")[0] for problem in log.problems] == ["Line 4", "Line 5", "Line 6"]


@pytest.mark.parametrize("text", ["step,time\n1,2\n", "[]\n", '{"a": 1}\n', "{", "\x00\x01\n"])
def test_what_is_not_a_log_is_reported(tmp_path, text) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(MonitorError, match=r"a\.csv' is not a log of the monitor \(line 1: "):
        read(path)


def test_files_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(MonitorError, match=r"The log .* does not exist\. Run a Monitor with the sink 'jsonl'"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(MonitorError, match="cannot be read"):
        read(tmp_path)
    path = tmp_path / "new.jsonl"
    path.write_text('{"kind":"run","version":99}\n')
    with pytest.raises(MonitorError, match="of version 99, but this deqcore reads versions up to 3"):
        read(path)


def test_a_growing_log_is_followed_line_by_line(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", *rows(2))
    tail = Tail(path)
    assert len(tail.log.rows) == 2
    assert not tail.poll()
    text = line(rows(3)[2]) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(text[:30])
        file.flush()
        assert not tail.poll()
        file.write(text[30:])
    assert tail.poll()
    assert tail.log.rows == rows(3)
    write(path, *rows(1))  # written again
    assert tail.poll()
    assert tail.log.rows == rows(1)


def test_an_empty_log_has_views(tmp_path) -> None:
    log = read(write(tmp_path / "a.jsonl"))
    assert "No rows yet" in shown(live_view(log, 10))
    assert verdict(log)[1] == "warn"
    assert "no rows" in render(log)


def test_sparklines() -> None:
    assert sparkline([1, 1, 1], 10) == "▁▁▁"
    assert sparkline([], 10) == ""
    assert sparkline([float("inf"), 1, 2], 10) == "×▁█"
    assert len(sparkline(list(range(1000)), 24)) == 24
    assert sparkline(list(range(1000)), 8) == "▁▂▃▄▅▆▇█"


@pytest.mark.parametrize("width", [120, 72])
def test_the_view_shows_numbers_events_and_the_mark(tmp_path, width) -> None:
    mark = Event(2, 1002.0, "retrain", "drifted [b]far[/b]", "deq_steps_psi", 0.5, "retrain")
    log = read(write(tmp_path / "a.jsonl", *rows(9, name="enc[red]"), mark))
    text = shown(live_view(log, 9, width, now=1068.0), width)
    assert max(map(len, text.splitlines())) <= width
    assert "step 8 · 9 solves · last 60 s ago" in text
    assert "RETRAIN: drifted [b]far[/b]" in text  # markup in names is shown, not obeyed
    (steps,) = [each for each in text.splitlines() if "enc[red]/forward_steps" in each]
    assert steps.split()[1:3] == ["7", "6"]  # latest, mean of 5, 6, 7
    assert "…" not in text


class Page(HTMLParser):
    """What a browser would load and run, and the text it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_no_network_and_runs_no_script_but_its_own(tmp_path) -> None:
    fired = Event(4, 1004.0, "fired", EVIL, "deq_forward_steps", 5.0, "warn")
    log = read(write(tmp_path / f"{EVIL.replace('/', '')}.jsonl", *rows(12, EVIL), *rows(3, "$x_1$ _hidden"), fired))
    text = render(log)
    page = Page(text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert page.tags.count("script") == 1
    assert f"script-src 'sha256-{digest}'\"" in text.replace("&#39;", "'")
    assert EVIL in "".join(page.text)  # shown as text: in the table, the event, the legends
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"@import|<link(?! rel=\"icon\")", text)
    assert page.tags.count("svg") == len(draw(log)) == 4
    assert "$x_1$ _hidden: forward steps" in "".join(page.text)
    assert "mathdefault" not in text  # a label that no parser reads


def test_the_numbers_of_the_page_are_those_of_the_log(tmp_path) -> None:
    made = rows(30)
    log = read(write(tmp_path / "a.jsonl", *made))
    steps = [row.values["deq_forward_steps"] for row in made]
    (row,) = [each for each in table(log) if each["metric"] == "deq_forward_steps"]
    assert float(row["mean"]) == pytest.approx(sum(steps) / 30, rel=1e-3)
    assert (row["first"], row["last"], row["least"], row["most"], row["count"]) == ("5", "7", "5", "7", "30")
    assert [(tile.value, tile.detail) for tile in tiles(log)] == [
        ("0.1", "median 0.001"),
        ("0 %", "median 0 %, above 0 % in 0 of 30"),
    ]
    text = "".join(Page(render(log)).text)
    for name in ("first", "last", "mean", "least", "most"):
        assert row[name] in text
    assert "30 solves, steps 0 to 29" in text
    assert '"note": "<b>bold</b>"' in text


def event(kind: str, message: str, action: str = "warn") -> Event:
    return Event(1, 1001.0, kind, message, "deq_forward_steps", 1.0, action)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], "good"),
        ([event("fired", "a")], "warn"),
        ([event("fired", "a"), event("cleared", "b")], "warn"),  # it ended, but it fired
        ([event("note", "a")], "warn"),
        ([event("sink", "a")], "warn"),
        ([event("retrain", "c", "retrain")], "bad"),
    ],
)
def test_the_verdict(tmp_path, events, expected) -> None:
    assert verdict(read(write(tmp_path / "a.jsonl", *rows(30), *events)))[1] == expected


def test_the_verdict_names_what_is_a_concern(tmp_path) -> None:
    bad = [Row(i, i, 1000.0 + i, {"deq_forward_steps": 3.0, "deq_nonfinite_fraction": 0.5}) for i in range(3)]
    assert verdict(read(write(tmp_path / "a.jsonl", *bad))) == (
        "No trigger is active, but check: NaN or diverged (worst 50 %, median 50 %, above 0 % in 3 of 3).",
        "warn",
    )


def test_the_worst_solve_counts(tmp_path) -> None:
    """23 of 300 solves with unconverged samples are not quiet, though the median is 0 and the last ones are well."""
    made = rows(300)
    for step in range(10, 33):
        made[step] = replace(made[step], values={**made[step].values, "deq_unconverged_fraction": 0.25})
    log = read(write(tmp_path / "a.jsonl", *made))
    (tile,) = [each for each in tiles(log) if each.title == "unconverged"]
    assert (tile.value, tile.detail, tile.concern) == ("25 %", "median 0 %, above 0 % in 23 of 300", True)
    sentence, kind = verdict(log)
    assert kind == "warn"
    assert "unconverged (worst 25 %, median 0 %, above 0 % in 23 of 300)" in sentence


def test_shares_are_percentages_on_the_page_and_in_the_terminal(tmp_path) -> None:
    made = [Row(i, i, 1000.0 + i, {"deq_unconverged_fraction": i / 4, "deq_coupling": i / 4}) for i in range(5)]
    log = read(write(tmp_path / "a.jsonl", *made))
    (row,) = [each for each in table(log) if each["metric"] == "deq_unconverged_fraction"]
    assert (row["unit"], row["first"], row["last"], row["mean"]) == ("%", "0", "100", "50")
    assert [tile.value for tile in tiles(log) if tile.title == "unconverged"] == ["100 %"]
    charts = {title: "".join(Page(svg).text) for title, svg in draw(log)}
    assert "% of samples" in charts["Samples that failed"]
    assert "unconverged fraction\n3: 75" in charts["Samples that failed"]
    assert "coupling\n3: 0.75" in charts["Coupling of rows"]
    for width in (80, 120):
        (line,) = [each for each in shown(live_view(log, 10, width)).splitlines() if "unconverged" in each]
        assert ("100 %" in line, "50 %" in line) == (True, True)


def test_a_log_of_version_1_is_read(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", *rows(3))
    path.write_text(path.read_text().replace('"version":3', '"version":1'))
    assert read(path).rows == rows(3)


def test_each_layers_own_settings_are_recorded_and_shown(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    reuse = {"forward__solver": "broyden", "backward__strategy": "broyden-reuse"}
    with Monitor(sinks=[{"sink": "jsonl", "path": str(path)}], triggers=[], every=1):
        for _ in range(3):
            deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((2, 3)), **reuse)
            deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((2, 3)), forward__rtol=1e-3)
    log = read(path)
    first, second = (row["backward"].split(" ")[0] for row in settings(log))  # once for each, not for each solve
    assert (first, second) == ("broyden-reuse", "exact-ift")
    assert [row["step"] for row in settings(log)] == ["0", "1"]
    assert "rtol=0.001" in settings(log)[1]["forward"]
    page = "".join(Page(render(log)).text)
    assert "broyden-reuse" in page.partition("The monitor's own settings")[0]
    assert [line(row) for row in log.rows] == [line(row) for row in read(path).rows]


def test_changing_tolerances_do_not_fill_the_log(tmp_path) -> None:
    with Monitor(sinks=[], triggers=[], every=1) as monitor:
        for i in range(40):
            deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((2, 3)), forward__rtol=1e-3 / (1 + i))
    assert sum(bool(row.settings) for row in monitor.rows) == 32


def test_a_long_log_is_drawn_with_few_points(tmp_path) -> None:
    log = read(write(tmp_path / "a.jsonl", *rows(3000)))
    assert len(render(log)) < 400_000


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch) -> None:
    log = read(write(tmp_path / "a.jsonl", *rows(2)))
    monkeypatch.setattr("deqcore.monitor.report.is_installed", lambda name: name != "matplotlib")
    with pytest.raises(MissingExtraError, match=r"'matplotlib'.*deqcore\[monitor\]"):
        render(log)


def test_every_panel_of_the_dashboard_shows_metrics_that_exist() -> None:
    board = load()
    known = {metric.name for metric in STANDARD} | {metric.name for metric, _ in COUNTERS}
    panels = board["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]  # type: ignore[union-attr]
    used = {name for text in expressions for name in re.findall(r"\bdeq_\w+", text)}
    queries = [each["query"] for each in board["templating"]["list"]]  # type: ignore[index]
    used |= {name for text in queries for name in re.findall(r"\bdeq_\w+", text)}
    assert used <= known
    unshown = {"deq_forward_evaluations", "deq_gradient_products", "deq_residual_ks_pvalue", "deq_steps_ks_pvalue"}
    assert known - used == unshown  # a new metric belongs on the dashboard, or here
    assert all(panel["targets"] and panel["title"] for panel in panels)  # type: ignore[union-attr]
    ids = [panel["id"] for panel in panels]  # type: ignore[union-attr]
    assert len(set(ids)) == len(ids)
    boxes = [panel["gridPos"] for panel in panels]  # type: ignore[union-attr]
    cells = [(x, y) for b in boxes for x in range(b["x"], b["x"] + b["w"]) for y in range(b["y"], b["y"] + b["h"])]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    labels = {label for text in expressions for label in re.findall(r"(\w+)=~", text)}
    assert labels == {"job", "layer"}
    json.dumps(board, allow_nan=False)
