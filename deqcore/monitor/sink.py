"""The contract of a sink, which takes the records of a monitor.

A sink is a dataclass whose fields are its options, registered under a name by the hook `deqcore_sinks`:

    @hookimpl
    def deqcore_sinks():
        yield SinkSpec("parquet", "deq_parquet:ParquetSink", summary="one row group per flush")

Requirements:

1. `write` gets all records since the last call, in order, and returns when they are handed over. It raises if they
   are not: the monitor then reports it once, keeps the records, and offers them again at the next flush. So `write`
   keeps all of its records or none.
2. It is called every few steps, from the thread that trains: slow work belongs in a thread of the sink.
3. Nothing is opened and nothing heavy is imported before `open`; `needs` names the packages that it will import.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from deqcore.monitor.metrics import Metric


@dataclass(frozen=True)
class Row:
    """The figures of one solve, or of one backward pass that no solution leads to.

    Attributes:
        step: training step: as `Monitor.advance` counts it, or else the number of the solve.
        solve: number of the solve since the monitor was made, from 0.
        time: seconds since the epoch.
        name: the layer, for models with several; "" if there is only one.
        values: by metric. What was not measured is absent; infinite values occur, NaN does not.
        settings: of the solve, as plain values, in the first row of a layer that ran with them; else empty.
        depths: of a forward solve: how many samples (or units, with `forward.batch = 2`) took how many steps, by the
            largest depth of a bin: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, …; empty bins are absent.

    Example:
        >>> Row(step=3, solve=2, time=0.0, values={"deq_forward_steps": 7.0}).values["deq_forward_steps"]
        7.0
    """

    step: int
    solve: int
    time: float
    values: Mapping[str, float]
    name: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    depths: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Event:
    """Something that happened: a trigger fired or was cleared, a sink failed, the retrain mark was set.

    Attributes:
        step: as in `Row`.
        time: seconds since the epoch.
        kind: "fired", "cleared", "retrain", "sink" or "note".
        message: one readable sentence.
        metric: what it is about, or "".
        value: of the metric that decided, or None.
        action: of the trigger, or "".

    Example:
        >>> Event(3, 0.0, "fired", "Too many steps.", "deq_forward_steps", 40.0, "warn").kind
        'fired'
    """

    step: int
    time: float
    kind: str
    message: str
    metric: str = ""
    value: float | None = None
    action: str = ""


Record: TypeAlias = Row | Event


@dataclass(frozen=True)
class RunInfo:
    """What a sink receives when it is opened.

    Attributes:
        metrics: all that may occur in rows, by name, with units and meanings.
        started: seconds since the epoch.
        config: the settings in force, as plain values.

    Example:
        >>> from deqcore.monitor import Metrics
        >>> RunInfo(Metrics(), 0.0).metrics["deq_forward_steps"].unit
        'steps'
    """

    metrics: Mapping[str, Metric]
    started: float
    config: Mapping[str, object] = field(default_factory=dict)


class Sink(ABC):
    """Takes records. A subclass is a dataclass of its options and is final.

    Attributes:
        keeps: whether written records can be read back; False for a sink that shows only the latest values.
        needs: import names of optional packages, each with the extra of deqcore that installs it. They are looked for
            when the monitor is made, so that a missing one is reported before the training begins.

    Example:
        >>> import numpy as np, deqcore
        >>> @dataclass
        ... class Kept(Sink):
        ...     records: list[Record] = field(default_factory=list)
        ...     def write(self, records: Sequence[Record]) -> None:
        ...         self.records.extend(records)
        >>> with deqcore.monitor.Monitor(sinks=[kept := Kept()]):
        ...     _ = deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((4, 2)))
        >>> len(kept.records)
        1
    """

    keeps: ClassVar[bool] = True
    needs: ClassVar[Mapping[str, str]] = {}

    def open(self, run: RunInfo) -> None:
        """Get ready. Called once before the first `write`; again, if it raised, at the next flush."""
        return None

    @abstractmethod
    def write(self, records: Sequence[Record]) -> None:
        """Hand over `records`, all or none."""

    def close(self) -> None:
        """Finish: called once, after the last `write`, also after an `open` or a `write` that failed."""
        return None
