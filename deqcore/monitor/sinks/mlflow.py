"""MLflow: metrics of the active run, or of one that the sink starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from deqcore.monitor.sink import Event, Record, RunInfo, Sink


@dataclass
class MlflowSink(Sink):
    """Log every metric by training step; a retrain mark becomes the tag `deqcore.retrain`.

    Args:
        tracking_uri: of the server or folder; None: MLflow's own setting.
        experiment: to log to, or None for the current one.
        run_name: of the run that is started where none is active.
    """

    tracking_uri: str | None = None
    experiment: str | None = None
    run_name: str = "deqcore"
    _mlflow: Any = field(default=None, init=False, repr=False)
    _own: bool = field(default=False, init=False, repr=False)
    needs: ClassVar[Mapping[str, str]] = {"mlflow": "mlflow"}

    def open(self, run: RunInfo) -> None:
        """Take the active run, or start one."""
        import mlflow

        if self.tracking_uri is not None:
            mlflow.set_tracking_uri(self.tracking_uri)
        if self.experiment is not None:
            mlflow.set_experiment(self.experiment)
        if mlflow.active_run() is None:
            mlflow.start_run(run_name=self.run_name)
            self._own = True
        self._mlflow = mlflow

    def write(self, records: Sequence[Record]) -> None:
        """Log the rows."""
        for record in records:
            if isinstance(record, Event):
                if record.kind == "retrain":
                    self._mlflow.set_tag("deqcore.retrain", record.message)
                continue
            prefix = f"{record.name}/" if record.name else ""
            self._mlflow.log_metrics({prefix + name: value for name, value in record.values.items()}, step=record.step)

    def close(self) -> None:
        """End the run that the sink started."""
        if self._own:
            self._mlflow.end_run()
            self._own = False
