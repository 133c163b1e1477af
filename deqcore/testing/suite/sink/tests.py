"""`SinkTests`: everything that a sink of the monitor must keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.monitor.metrics import Metrics
from deqcore.monitor.monitor import Monitor
from deqcore.monitor.settings import make_sink
from deqcore.monitor.sink import Event, Row, RunInfo, Sink
from deqcore.testing.suite.import_cost import check_light

METRIC = "deq_forward_steps"


class SinkTests:
    """Subclass it, name your sink, say where it writes and how that is read back, and run pytest.

    Attributes:
        sink: registered name.

    Example:
        ::

            class TestMine(SinkTests):
                sink = "mine"

                def options(self, folder):
                    return {"path": str(folder / "log.db")}

                def read(self, folder):
                    return [(step, values) for step, values in …]
    """

    sink: ClassVar[str]

    def options(self, folder: Path) -> Mapping[str, object]:
        """Return options that let the sink write into an empty folder."""
        return {}

    def read(self, folder: Path) -> list[tuple[int, Mapping[str, float]]]:
        """`(step, values)` of each row that was written, in order; only for a sink that `keeps` what it gets."""
        raise NotImplementedError("SinkTests.read: say how the rows of your sink are read back")

    @pytest.fixture
    def made(self, tmp_path: Path) -> Sink:
        """The sink under test, not opened."""
        return make_sink({"sink": self.sink, **self.options(tmp_path)})[1]

    def test_is_a_dataclass_of_options_that_touches_nothing(self, made: Sink, tmp_path: Path) -> None:
        assert isinstance(made, Sink), "a sink must be a subclass of deqcore.monitor.Sink."
        assert dataclasses.is_dataclass(type(made)), "options are fields of a dataclass"
        assert not list(tmp_path.iterdir()), "nothing is opened before open()"
        for package in type(made).needs:
            assert plugins.is_installed(package), f"the sink needs {package}, which is not installed"

    def test_it_imports_no_framework(self) -> None:
        check_light("sink", self.sink)

    def test_rows_arrive_in_order_and_whole(self, made: Sink, tmp_path: Path) -> None:
        made.open(run())
        made.write([row(0), row(1)])
        made.write([row(2, value=np.inf)])
        made.close()
        if made.keeps:
            result = self.read(tmp_path)
            assert [step for step, _ in result] == [0, 1, 2], (
                "the sink must keep every row, in the order in which they came."
            )
            assert [values[METRIC] for _, values in result] == [0.5, 1.5, np.inf], (
                "the sink must keep the values of every row as they are, inf included."
            )

    def test_events_and_unusual_rows_do_no_harm(self, made: Sink, tmp_path: Path) -> None:
        made.open(run())
        made.write([])
        made.write([Event(0, 1e9, "note", 'a sentence: with; "quotes", commas and\nlines'), row(0)])
        made.write([Row(1, 1, 1e9 + 1, {}, name="a layer")])
        made.close()
        if made.keeps:
            assert [values[METRIC] for _, values in self.read(tmp_path) if METRIC in values] == [0.5], (
                "events and rows without the metric must neither raise nor add values."
            )

    def test_closing_is_safe_at_any_time(self, made: Sink) -> None:
        made.close()  # after an open that failed
        made.open(run())
        made.close()

    def test_two_runs_in_one_place(self, tmp_path: Path) -> None:
        for _ in range(2):
            sink = make_sink({"sink": self.sink, **self.options(tmp_path)})[1]
            sink.open(run())
            sink.write([row(0)])
            sink.close()
        if sink.keeps:
            assert self.read(tmp_path), "the second run destroyed what there was"

    def test_a_monitor_can_use_it_by_name(self, tmp_path: Path) -> None:
        with Monitor(sinks=[{"sink": self.sink, **self.options(tmp_path)}], every=2) as monitor:
            for _ in range(5):
                deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((4, 2)))
                monitor.advance()
        assert not [event for event in monitor.events if event.kind == "sink"], "the sink failed"
        if make_sink({"sink": self.sink, **self.options(tmp_path)})[1].keeps:
            assert len(self.read(tmp_path)) == 5, "a monitor that names the sink must deliver all of its rows."

    def test_unknown_options_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(deqcore.errors.ConfigError, match="no option 'definitely_not_one'"):
            make_sink({"sink": self.sink, **self.options(tmp_path), "definitely_not_one": Any})


def run() -> RunInfo:
    """Return the run that a sink is opened with."""
    return RunInfo(Metrics(), 1e9, {"backend": "numpy"})


def row(step: int, value: float | None = None) -> Row:
    """Return a row of one figure."""
    return Row(step, step, 1e9 + step, {METRIC: step + 0.5 if value is None else value})
