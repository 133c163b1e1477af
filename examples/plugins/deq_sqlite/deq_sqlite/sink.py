"""Rows in an SQLite database, one line per figure."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field

from deqcore.monitor.sink import Record, Row, RunInfo, Sink

TABLE = (
    "CREATE TABLE IF NOT EXISTS figures (step INTEGER, solve INTEGER, time REAL, layer TEXT, metric TEXT, value REAL)"
)


@dataclass
class SqliteSink(Sink):
    """Append the figures of each solve to the table `figures`.

    Args:
        path: the database; it is made if it is not there.
    """

    path: str = "monitor.db"
    _database: sqlite3.Connection | None = field(default=None, init=False, repr=False)

    def open(self, run: RunInfo) -> None:
        self._database = sqlite3.connect(self.path)
        with self._database:
            self._database.execute(TABLE)

    def write(self, records: Sequence[Record]) -> None:
        assert self._database is not None
        rows = [
            (each.step, each.solve, each.time, each.name, metric, value)
            for each in records
            if isinstance(each, Row)
            for metric, value in each.values.items()
        ]
        with self._database:  # one transaction: all records or none
            self._database.executemany("INSERT INTO figures VALUES (?, ?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
