"""TensorBoard: scalars over training steps, written without TensorFlow or PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from deqcore.monitor.sink import Record, Row, RunInfo, Sink


@dataclass
class TensorBoardSink(Sink):
    """Write every metric as a scalar; a layer's name goes before it, as in "encoder/deq_forward_steps".

    Args:
        folder: where the event file is made.
    """

    folder: str = "runs/deqcore"
    _writer: Any = field(default=None, init=False, repr=False)
    needs: ClassVar[Mapping[str, str]] = {"tensorboard": "monitor"}

    def open(self, run: RunInfo) -> None:
        """Make the event file."""
        from tensorboard.summary import Writer

        self._writer = Writer(self.folder)

    def write(self, records: Sequence[Record]) -> None:
        """Hand over the rows. TensorBoard does not have events."""
        for row in records:
            if isinstance(row, Row):
                for metric, value in row.values.items():
                    tag = f"{row.name}/{metric}" if row.name else metric
                    self._writer.add_scalar(tag, value, row.step)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
