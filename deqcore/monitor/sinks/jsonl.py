"""JSON lines: the default sink, and the log that `deqcore monitor watch` and `report` read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from deqcore.monitor.lines import header, line
from deqcore.monitor.sink import Record, Run, Sink


@dataclass
class JsonlSink(Sink):
    """Append each record to a file as one line of JSON.

    The lines of a flush reach the file by one unbuffered write, so a reader sees whole flushes and a killed process
    leaves at most the last line torn. A write that fails half-way (disk full) is taken back.

    Args:
        path: the file; it is appended to, and its folder is made.
    """

    path: str = "monitor.jsonl"
    _file: int | None = field(default=None, init=False, repr=False)

    def open(self, run: Run) -> None:
        """Open the file and write the run's header."""
        if self._file is None:
            folder = os.path.dirname(self.path)
            if folder:
                os.makedirs(folder, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._append(header(run))

    def write(self, records: Sequence[Record]) -> None:
        """Append the records."""
        self._append("\n".join(map(line, records)))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, text: str) -> None:
        assert self._file is not None
        start = os.lseek(self._file, 0, os.SEEK_END)
        # An earlier process may have died in the middle of a line.
        torn = start > 0 and os.pread(self._file, 1, start - 1) != b"\n"
        rest = (b"\n" if torn else b"") + text.encode() + b"\n"
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            _take_back(self._file, start)
            raise


def _take_back(file: int, size: int) -> None:
    """Cut the file to its earlier size, so that no half line stays; what is no plain file cannot be cut."""
    try:
        os.ftruncate(file, size)
    except OSError:
        return
