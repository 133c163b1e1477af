"""JSON lines: the default sink, and the log that `deqcore monitor watch` and `report` read."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from deqcore.monitor.log.append import AppendFile
from deqcore.monitor.log.format import header, line
from deqcore.monitor.sink import Record, RunInfo, Sink


@dataclass
class JsonlSink(Sink):
    """Append each record to a file as one line of JSON. Several processes may append to one file.

    Args:
        path: the file; it is appended to, and its folder is made.
    """

    path: str = "monitor.jsonl"
    _file: AppendFile | None = field(default=None, init=False, repr=False)
    _key: str = field(default="", init=False, repr=False)

    def open(self, run: RunInfo) -> None:
        """Open the file and write the run's header."""
        self._file = self._file or AppendFile(self.path)
        self._key = self._key or secrets.token_hex(4)
        self._file.append(header(run, self._key))

    def write(self, records: Sequence[Record]) -> None:
        """Append the records."""
        assert self._file is not None
        if records:
            self._file.append("\n".join(line(record, self._key) for record in records))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
