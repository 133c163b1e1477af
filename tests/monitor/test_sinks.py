"""Sinks: what they write, read back by something independent; and how they fail."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.errors import ConfigError, MissingExtraError, MonitorWarning, PluginError, UnknownNameError
from deqcore.monitor import Event, Metrics, Monitor, Row, Run, Sink
from deqcore.monitor.guard import LIMIT
from deqcore.monitor.lines import line, parse
from deqcore.plugins import SinkSpec

RUN = Run(Metrics(), 1000.0, {"backend": "auto"})
ROWS = [
    Row(3, 7, 1001.5, {"deq_forward_steps": 4.5, "deq_forward_residual_max": math.inf}, "encoder"),
    Event(3, 1002.0, "fired", "es brennt <b>", "deq_forward_steps", 4.5, "warn"),
    Row(4, 8, 1003.0, {"deq_forward_steps": 5.0}),
]


@pytest.fixture(autouse=True)
def _fresh():
    plugins.reset()
    yield
    plugins.reset()


@dataclass
class Flaky(Sink):
    """Fails while told to."""

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
    with pytest.raises(ValueError, match="it lacks|its kind"):
        parse(table)


def test_jsonl_is_the_default_and_appends(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with Monitor(every=2):
            solve(3)
    tables = lines_of(tmp_path / "monitor.jsonl")
    assert [table["kind"] for table in tables] == ["run", "row", "row", "row"] * 2
    assert [table["solve"] for table in tables if table["kind"] == "row"] == [0, 1, 2] * 2
    assert tables[0]["version"] == 1
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

    monkeypatch.setattr("deqcore.monitor.appending.os.write", write)
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
    told = [str(each.message) for each in seen]
    assert len(told) == 2
    assert "The sink 'jsonl' fails: OSError: [Errno 28]" in told[0]
    (rescued,) = tmp_path.glob("deqcore-monitor-*.jsonl")
    assert str(rescued) in told[1]
    tables = lines_of(rescued)
    assert [table.get("solve") for table in tables if table["kind"] == "row"] == [0, 1, 2, 3]


def test_a_sink_that_raises_is_told_once_and_gets_everything_later() -> None:
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
    monkeypatch.setattr("deqcore.monitor.guard.LIMIT", 5)
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
    assert monitor._outlet.guards[0].lost > 0
    assert LIMIT > 1000


def test_options_of_a_sink_are_checked(tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'jsonl'"):
        Monitor(sinks=["json"])
    with pytest.raises(ConfigError, match=r"sink 'jsonl' has no option 'pth'\. Did you mean 'path'"):
        Monitor(sinks=[{"sink": "jsonl", "pth": "x"}])
    with pytest.raises(ConfigError, match="path = 3"):
        Monitor(sinks=[{"sink": "jsonl", "path": 3}])
    with pytest.raises(ConfigError, match="the name of a registered sink"):
        Monitor(sinks=[{"path": "x"}])
    plugins.register(SinkSpec("wrong", "deqcore.monitor.metrics:Metric"))
    with pytest.raises(PluginError, match=r"subclass of deqcore\.monitor\.Sink"):
        Monitor(sinks=[{"sink": "wrong", "name": "a", "unit": "1", "help": ""}])


def test_a_missing_package_is_told_before_the_training(monkeypatch) -> None:
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
