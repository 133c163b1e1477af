"""Weights & Biases: metrics of the active run, or of one that the sink starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from deqcore.monitor.sink import Event, Record, RunInfo, Sink

STEP = "deq_step"


@dataclass
class WandbSink(Sink):
    """Log every metric over `deq_step`, the training step, so that the run's own step counter is left alone.

    A trigger that fires becomes an alert of the run.

    Args:
        project: of the run that is started where none is active.
        run_name: of that run.
        mode: of that run; "offline" writes to the disk only.
    """

    project: str = "deqcore"
    run_name: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"
    _run: Any = field(default=None, init=False, repr=False)
    _own: bool = field(default=False, init=False, repr=False)
    needs: ClassVar[Mapping[str, str]] = {"wandb": "wandb"}

    def open(self, run: RunInfo) -> None:
        """Take the active run, or start one."""
        import wandb

        self._run = wandb.run
        if self._run is None:
            self._run = wandb.init(project=self.project, name=self.run_name, mode=self.mode)
            self._own = True
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("deq_*", step_metric=STEP)

    def write(self, records: Sequence[Record]) -> None:
        """Log the rows."""
        for record in records:
            if isinstance(record, Event):
                if record.kind == "fired":
                    self._run.alert(title=f"deqcore: {record.metric}", text=record.message)
                continue
            suffix = f"/{record.name}" if record.name else ""
            self._run.log({STEP: record.step} | {name + suffix: value for name, value in record.values.items()})

    def close(self) -> None:
        """Finish the run that the sink started."""
        if self._own:
            self._run.finish()
            self._own = False
