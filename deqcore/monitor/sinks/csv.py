"""CSV: one line per row, one column per metric, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from deqcore.errors import MonitorError
from deqcore.monitor.log.append import AppendFile
from deqcore.monitor.sink import Event, Record, RunInfo, Sink

HEAD = ("step", "solve", "time", "name")
TAIL = ("event", "message")


@dataclass
class CsvSink(Sink):
    """Append each record to a file; the first line names the columns.

    Every known metric has its column, empty where it was not measured. An event is a line with the last two columns.

    Args:
        path: the file; it is appended to, and its folder is made.
    """

    path: str = "monitor.csv"
    _file: AppendFile | None = field(default=None, init=False, repr=False)
    _columns: tuple[str, ...] = field(default=(), init=False, repr=False)

    def open(self, run: RunInfo) -> None:
        """Open the file; write the columns if it is new.

        Raises:
            MonitorError: the file has other columns.
        """
        self._columns = (*HEAD, *run.metrics, *TAIL)
        self._file = self._file or AppendFile(self.path)
        head = ",".join(self._columns)
        if not self._file.size:
            self._file.append(head)
        elif self._file.first_line() != head:
            raise MonitorError(f"{self.path} has other columns than this run: name another file, or move it away.")

    def write(self, records: Sequence[Record]) -> None:
        """Append the records."""
        assert self._file is not None
        text = io.StringIO()
        table = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        table.writerows(map(_cells, records))
        self._file.append(text.getvalue()[:-1])

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _cells(record: Record) -> dict[str, object]:
    head: dict[str, object] = {"step": record.step, "time": record.time}
    if isinstance(record, Event):
        return head | {"event": record.kind, "message": record.message}
    return head | {"solve": record.solve, "name": record.name} | dict(record.values)
