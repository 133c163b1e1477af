"""Sinks: what they write, read back by something independent; and how they fail."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.errors import ConfigError, MissingExtraError, MonitorWarning, PluginError, UnknownNameError
from deqcore.monitor import Event, Metrics, Monitor, Row, RunInfo, Sink
from deqcore.monitor.delivery import LIMIT
from deqcore.monitor.live import live_view
from deqcore.monitor.log import append
from deqcore.monitor.log.append import AppendFile
from deqcore.monitor.log.format import header, line, parse
from deqcore.monitor.log.reader import Tail, read
from deqcore.monitor.report import render
from deqcore.monitor.sinks.jsonl import JsonlSink
from deqcore.plugins import SinkSpec

RUN = RunInfo(Metrics(), 1000.0, {"backend": "auto"})
ROWS = [
    Row(3, 7, 1001.5, {"deq_forward_steps": 4.5, "deq_forward_residual_max": math.inf}, "encoder"),
    Event(3, 1002.0, "fired", "es brennt <b>", "deq_forward_steps", 4.5, "warn"),
    Row(4, 8, 1003.0, {"deq_forward_steps": 5.0}),
]


pytestmark = pytest.mark.usefixtures("no_plugins")


@dataclass
class Flaky(Sink):
    """Fails on demand."""

    taken: list = field(default_factory=list)
    failing: bool = False
    openings: int = 0
    closed: bool = False

    def open(self, run):
        self.openings += 1

    def write(self, records):
        if self.failing:
            raise RuntimeError("no more room")
        self.taken.extend(records)

    def close(self):
        self.closed = True


def solve(count: int = 1) -> None:
    for _ in range(count):
        deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((2, 3)))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(each) for each in path.read_text().splitlines()]


@pytest.mark.parametrize("record", ROWS)
def test_a_line_is_strict_json_and_comes_back(record) -> None:
    table = json.loads(line(record), parse_constant=pytest.fail)
    assert parse(table) == record


@pytest.mark.parametrize("table", [{}, {"kind": "row"}, {"kind": "row", "step": "x"}, {"kind": "cake"}])
def test_what_is_no_record_is_refused(table) -> None:
    with pytest.raises(ValueError, match="a field is missing or wrong|its kind must be"):
        parse(table)


def test_jsonl_is_the_default_and_appends(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with Monitor(every=2):
            solve(3)
    tables = lines_of(tmp_path / "monitor.jsonl")
    assert [table["kind"] for table in tables] == ["run", "row", "row", "row"] * 2
    assert [table["solve"] for table in tables if table["kind"] == "row"] == [0, 1, 2] * 2
    assert tables[0]["version"] == 3
    assert tables[0]["units"]["deq_forward_seconds"] == "seconds"
    assert tables[1]["deq_forward_residual"] < 1e-6


def test_jsonl_mends_a_torn_line_of_an_earlier_process(tmp_path) -> None:
    path = tmp_path / "a" / "log.jsonl"
    path.parent.mkdir()
    path.write_text('{"kind": "row", "st')
    with Monitor(sinks=[{"sink": "jsonl", "path": str(path)}]):
        solve()
    torn, *rest = path.read_text().splitlines()
    assert torn == '{"kind": "row", "st'
    assert [json.loads(each)["kind"] for each in rest] == ["run", "row"]


def test_a_write_that_fails_half_way_is_taken_back(tmp_path, monkeypatch) -> None:
    path = tmp_path / "log.jsonl"
    real = os.write
    room = [10_000]

    def write(file: int, data: bytes) -> int:
        if room[0] == 0:
            raise OSError(28, "No space left on device")
        done = real(file, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr("deqcore.monitor.log.append.os.write", write)
    with Monitor(sinks=[{"sink": "jsonl", "path": str(path)}], every=1) as monitor:
        solve()
        room[0] = 20
        with pytest.warns(MonitorWarning, match=r"'jsonl' fails: OSError: .*No space left") as seen:
            solve(3)
        assert len(seen) == 1
        assert all(json.loads(each) for each in path.read_text().splitlines())
        assert len(lines_of(path)) == 2
        room[0] = 10_000
        solve()
    rows = [table["solve"] for table in lines_of(path) if table["kind"] == "row"]
    assert rows == [0, 1, 2, 3, 4]  # nothing was lost
    assert [row.solve for row in monitor.rows] == rows


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_stops_nothing_and_the_data_are_rescued(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(MonitorWarning) as seen, Monitor(sinks=[{"sink": "jsonl", "path": "/dev/full"}], every=1):
        solve(4)
    messages = [str(each.message) for each in seen]
    assert len(messages) == 2
    assert "The sink 'jsonl' fails: OSError: [Errno 28]" in messages[0]
    (rescued,) = tmp_path.glob("deqcore-monitor-*.jsonl")
    assert str(rescued) in messages[1]
    tables = lines_of(rescued)
    assert [table.get("solve") for table in tables if table["kind"] == "row"] == [0, 1, 2, 3]


def test_a_sink_that_raises_is_reported_once_and_gets_everything_later() -> None:
    bad, good = Flaky(failing=True), Flaky()
    with Monitor(sinks=[bad, good], every=1) as monitor:
        with pytest.warns(MonitorWarning, match="'Flaky' fails: RuntimeError: no more room") as seen:
            solve(3)
        assert len(seen) == 1
        bad.failing = False
        solve(2)
        bad.failing = True
        with pytest.warns(MonitorWarning, match="no more room"):  # a new failure is news again
            solve(1)
        bad.failing = False
    rows = [record.solve for record in bad.taken if isinstance(record, Row)]
    assert rows == [0, 1, 2, 3, 4, 5] == [row.solve for row in monitor.rows]
    assert [record.kind for record in good.taken if isinstance(record, Event)] == ["sink", "sink"]
    assert bad.closed
    assert bad.openings == good.openings == 1


def test_what_waits_for_a_failing_sink_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr("deqcore.monitor.delivery.LIMIT", 5)
    bad, good = Flaky(failing=True), Flaky()
    monitor = Monitor(sinks=[bad, good], every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MonitorWarning)
        with monitor:
            solve(9)
            bad.failing = False
    rows = [record.solve for record in bad.taken if isinstance(record, Row)]
    assert rows[-1] == 8
    assert len(bad.taken) <= 7
    assert monitor._sinks.sinks[0].lost > 0
    assert LIMIT > 1000


def test_options_of_a_sink_are_checked(tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'jsonl'"):
        Monitor(sinks=["json"])
    with pytest.raises(ConfigError, match=r"sink 'jsonl' has no option 'pth'\. Did you mean 'path'"):
        Monitor(sinks=[{"sink": "jsonl", "pth": "x"}])
    with pytest.raises(ConfigError, match="path must be .*got 3"):
        Monitor(sinks=[{"sink": "jsonl", "path": 3}])
    with pytest.raises(ConfigError, match="the name of a registered sink"):
        Monitor(sinks=[{"path": "x"}])
    plugins.register(SinkSpec("wrong", "deqcore.monitor.metrics:Metric"))
    with pytest.raises(PluginError, match=r"subclass of deqcore\.monitor\.Sink"):
        Monitor(sinks=[{"sink": "wrong", "name": "a", "unit": "1", "help": ""}])


def test_a_missing_package_is_reported_before_the_training(monkeypatch) -> None:
    @dataclass
    class Needy(Flaky):
        needs: ClassVar = {"no_such_package": "monitor"}

    with pytest.raises(MissingExtraError, match=r"'Needy' needs the package 'no_such_package'.*deqcore\[monitor\]"):
        Monitor(sinks=[Needy()])


def test_a_plugged_in_sink_is_used_by_its_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "deq_lines.py").write_text(
        "from dataclasses import dataclass\nfrom deqcore.monitor import Row, Sink\n@dataclass\n"
        "class Lines(Sink):\n    path: str\n    def write(self, records):\n"
        "        with open(self.path, 'a') as f:\n"
        "            f.writelines(f'{r.solve}\\n' for r in records if isinstance(r, Row))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugins.register(SinkSpec("lines", "deq_lines:Lines"))
    out = tmp_path / "out.txt"
    with Monitor(deqcore.Config(monitor={"sinks": [{"sink": "lines", "path": str(out)}], "every": 2})):
        solve(5)
    assert out.read_text().split() == ["0", "1", "2", "3", "4"]
    with pytest.raises(ConfigError, match="needs the option path"):
        Monitor(sinks=["lines"])


# -- several writers, interrupts, and text of all kinds ------------------------------------------------------------

WRITER = """
import sys, time
from deqcore.monitor import Event, Metrics, Row, RunInfo
from deqcore.monitor.sinks.jsonl import JsonlSink

sink = JsonlSink(sys.argv[1])
sink.open(RunInfo(Metrics(), 0.0))
for step in range(300):
    sink.write([Row(step, step, float(step), {"deq_forward_steps": 1.0}, sys.argv[2])])
sink.write([Event(300, 0.0, "note", sys.argv[2])])
sink.close()
"""


def test_rows_of_several_processes_are_all_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    runs = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "abc"]
    assert [run.wait(60) for run in runs] == [0, 0, 0]
    log = read(path)
    assert not log.problems
    lines = [json.loads(each) for each in path.read_text().splitlines()]
    together = {each["run"] for each in lines}
    assert len(together) == 3
    # Those that were over before another began are left out, as after a restart.
    places = {run: [i for i, each in enumerate(lines) if each["run"] == run] for run in together}
    alone = [run for run in together if any(max(places[run]) < min(places[other]) for other in together - {run})]
    assert len(log.rows) == 300 * (3 - len(alone))
    assert len(log.events) == 3 - len(alone)


def test_runs_that_alternate_are_all_read_and_one_that_is_over_is_left_out(tmp_path: Path) -> None:
    def opened() -> JsonlSink:
        sink = JsonlSink(str(tmp_path / "a.jsonl"))
        sink.open(RUN)
        return sink

    old, one = opened(), None
    old.write([Row(step, step, 0.0, {"deq_forward_steps": 1.0}, "old") for step in range(5)])
    one, two = opened(), opened()
    for step in range(20):
        one.write([Row(step, step, 0.0, {"deq_forward_steps": 1.0}, "one")])
        if step >= 7:
            two.write([Row(step - 7, step, 0.0, {"deq_forward_steps": 1.0}, "two")])
    for sink in (old, one, two):
        sink.close()
    log = read(tmp_path / "a.jsonl")
    assert [sum(row.name == name for row in log.rows) for name in ("old", "one", "two")] == [0, 20, 13]
    assert (log.runs, log.left_out) == (3, 1)
    assert not log.problems


def test_a_run_that_begins_late_hides_none_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [Row(step, step, 0.0, {"deq_forward_steps": 1.0}) for step in range(4)]
    lines = [header(RUN, "a"), *(line(row, "a") for row in rows), header(RUN, "b"), line(rows[0], "b")]
    path.write_text("\n".join(lines) + "\n")
    tail = Tail(path)
    assert len(tail.log.rows) == 1
    with path.open("a") as file:
        file.write(line(Row(4, 4, 0.0, {"deq_forward_steps": 2.0}), "a") + "\n")
    tail.poll()
    assert [row.step for row in tail.log.rows] == [0, 1, 2, 3, 0, 4]
    assert tail.log.left_out == 0


def test_an_interrupt_in_the_middle_of_a_write_leaves_no_torn_line(tmp_path: Path, monkeypatch) -> None:
    path, real = tmp_path / "a.jsonl", os.write
    sink = JsonlSink(str(path))
    sink.open(RUN)
    sink.write(ROWS[:1])
    before, calls = path.read_bytes(), []

    def write(file: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise problem
        return real(file, data[:5])

    for problem in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        calls.clear()
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(type(problem)):
            sink.write(ROWS[2:])
        monkeypatch.setattr(os, "write", real)
        assert path.read_bytes() == before
    sink.write(ROWS[2:])
    assert len(read(path).rows) == 2


def test_a_block_that_another_process_wrote_meanwhile_is_not_taken_back(tmp_path: Path, monkeypatch) -> None:
    path, real = tmp_path / "a.jsonl", os.write
    file, other = AppendFile(str(path)), AppendFile(str(path))
    file.append("first")
    calls = []

    def write(handle: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 2:
            real(other._file, b"\nfrom another\n")
            raise OSError(28, "No space left on device")
        return real(handle, data[:3])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space"):
        file.append("second")
    assert path.read_text() == "first\nsec\nfrom another\n"
    file.close()
    other.close()


def test_a_process_that_sits_on_the_lock_stops_no_training(tmp_path: Path, monkeypatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(append, "PAUSE", 0.0)
    path = tmp_path / "a.jsonl"
    file, other = AppendFile(str(path)), AppendFile(str(path))
    fcntl.flock(other._file, fcntl.LOCK_EX)
    file.append("all the same")
    assert path.read_text() == "all the same\n"
    file.close()
    other.close()


LABELS = ["\ud800", "a\udcffb", "\x00", "a\nb", "\u2028", "é🎉", "x" * 100_000, "$x$", "_x", "<b>"]


@pytest.mark.parametrize("label", LABELS, ids=range(len(LABELS)))
@pytest.mark.parametrize("sink", ["jsonl", "csv", "prometheus-textfile", "tensorboard"])
def test_any_label_can_be_written(label: str, sink: str, tmp_path: Path) -> None:
    if sink == "tensorboard":
        pytest.importorskip("tensorboard")
        options = {"sink": sink, "folder": str(tmp_path)}
    else:
        options = {"sink": sink, "path": str(tmp_path / "a.prom")}
    with Monitor(sinks=[options], every=1) as monitor:
        monitor.observe(deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((1, 2))), name=label)
    if sink == "jsonl":
        log = read(tmp_path / "a.prom")
        assert len(log.rows) == 2
        json.dumps(log.rows[1].name).encode()
        if label not in ("\ud800", "\x00", "x" * 100_000):
            return
        pytest.importorskip("matplotlib")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of glyphs that the font lacks
            render(log).encode()


def test_what_no_sink_takes_and_cannot_be_rescued_is_reported(tmp_path: Path, monkeypatch) -> None:
    """Whatever the records hold, nothing is raised out of the block."""
    monkeypatch.setattr("deqcore.monitor.delivery.line", lambda record: 1 / 0)
    monkeypatch.setattr("deqcore.monitor.delivery.header", lambda run: json.dumps(math.nan, allow_nan=False))
    with pytest.warns(MonitorWarning) as shown, Monitor(sinks=[Flaky(failing=True)]):
        solve(1)
    assert any("records of the monitor are lost" in str(each.message) for each in shown)


@pytest.mark.parametrize("time", [1e18, -1e18, math.inf, -math.inf, math.nan, -1.0, 0.0, 4e11])
def test_any_time_can_be_shown(time: float, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.jsonl"
    records = [Event(1, time, "fired", "text"), Row(1, 1, time, {"deq_forward_steps": 1e308, "own": -1e308})]
    path.write_text("\n".join([header(RUN), *map(line, records)]))
    page = render(read(path))
    assert "text" in page
    assert live_view(read(path), 10) is not None


@pytest.mark.parametrize("step", [10**400, 2**63, math.nan, math.inf, "x", None], ids=range(6))
def test_a_step_that_is_none_is_a_problem_of_its_line(step: object, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([header(RUN), line(Row(step, 1, 1.0, {"deq_forward_steps": 1.0})), line(ROWS[2])]) + "\n")
    log = read(path)
    assert len(log.rows) == 1
    assert len(log.problems) == 1
