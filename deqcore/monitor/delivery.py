"""Delivery of records to sinks: one that fails never stops the training, and its records are offered again."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from deqcore.errors import MissingExtraError, MonitorWarning
from deqcore.monitor.log.format import header, line
from deqcore.monitor.settings import SinkLike, make_sink
from deqcore.monitor.sink import Event, Record, Row, RunInfo, Sink
from deqcore.monitor.text import encodable
from deqcore.plugins.lookup import is_installed
from deqcore.solve.user_line import warn

LIMIT: Final = 20_000  # records that are kept for a sink that fails


class SinkGroup:
    """Writes records to every sink; a failure in one becomes an event in the others.

    Args:
        sinks: `Sink`s, registered names or tables, as for `Monitor`.
        run: passed to the sinks when they open.

    Raises:
        ConfigError: a sink's options do not fit.
        MissingExtraError: a package that a sink needs is not installed.
    """

    def __init__(self, sinks: Iterable[SinkLike], run: RunInfo) -> None:
        self.run = run
        self.sinks = [ResilientSink(*make_sink(sink), self._notify) for sink in sinks]
        self._step = 0
        self._events: list[Event] = []
        self._warnings: list[str] = []

    def write(self, step: int, records: Iterable[Record]) -> None:
        """Offer records to all sinks, with the events of failures up to here."""
        self._step = step
        failures, self._events = self._events, []
        everything = [_encodable(record) for record in (*failures, *records)]
        for sink in self.sinks:
            sink.write(self.run, everything)
        self._warn_all()

    def close(self) -> None:
        """Write the remaining records, close the sinks, and save what none of them took."""
        self.write(self._step, ())
        for sink in self.sinks:
            sink.close()
        save_undelivered(self.run, self.sinks)
        self._warn_all()

    def _notify(self, text: str) -> None:
        self._events.append(Event(self._step, time.time(), "sink", text))
        self._warnings.append(text)

    def _warn_all(self) -> None:
        """Warn after every sink has its records, since the user's filters may turn a warning into an error."""
        texts, self._warnings = self._warnings, []
        for text in texts:
            warn(text, MonitorWarning)


def _encodable(record: Record) -> Record:
    """Return the record with text that every sink can write: labels come from the user, and messages quote errors."""
    if isinstance(record, Row):
        return record if encodable(record.name) == record.name else replace(record, name=encodable(record.name))
    return record if encodable(record.message) == record.message else replace(record, message=encodable(record.message))


class ResilientSink:
    """Calls a sink and catches its exceptions.

    Args:
        name: that the sink is registered under.
        sink: the sink.
        tell: takes the text of a failure, so that the other sinks record it.

    Attributes:
        waiting: records that the sink has not taken yet; above `LIMIT` the oldest are dropped.
        lost: number of dropped records.

    Raises:
        MissingExtraError: a package that the sink needs is not installed.
    """

    def __init__(self, name: str, sink: Sink, warn_user: Callable[[str], None]) -> None:
        for package, extra in sink.needs.items():
            if not is_installed(package):
                raise MissingExtraError.of(f"The sink {name!r}", package, extra)
        self.name = name
        self.sink = sink
        self.waiting: list[Record] = []
        self.lost = 0
        self._notify = warn_user
        self._opened = False
        self._failing = False

    def write(self, run: RunInfo, records: Iterable[Record]) -> None:
        """Offer new records and those that the sink has refused before."""
        self.waiting.extend(records)
        try:
            if not self._opened:
                self.sink.open(run)
                self._opened = True
            if self.waiting:
                self.sink.write(tuple(self.waiting))
        except Exception as error:
            self.lost += max(0, len(self.waiting) - LIMIT)
            del self.waiting[:-LIMIT]
            self._report(error)
        else:
            self.waiting.clear()
            self._failing = False

    def close(self) -> None:
        """Close the sink."""
        try:
            self.sink.close()
        except Exception as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        """Report the first failure of a series, not one at every flush."""
        if self._failing:
            return
        self._failing = True
        text = (
            f"The sink {self.name!r} fails: {type(error).__name__}: {error}. Training continues; up to {LIMIT} records "
            f"are kept and offered again at every flush."
        )
        self._notify(text)


def save_undelivered(run: RunInfo, sinks: Sequence[ResilientSink]) -> Path | None:
    """Write undelivered records to a log in the temporary folder, at the end of a run.

    Returns:
        The file, or None if all records were delivered or if writing failed, which gives a warning.
    """
    keepers = [sink for sink in sinks if sink.sink.keeps]
    if not keepers or any(not sink.waiting for sink in keepers):
        return None
    records = max((sink.waiting for sink in keepers), key=len)
    if not any(not isinstance(record, Event) for record in records):
        return None
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="deqcore-monitor-", suffix=".jsonl", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write("\n".join([header(run), *map(line, records)]) + "\n")
    except Exception as error:  # what made the sinks fail may lie in the records
        warn(f"{len(records)} records of the monitor are lost: {error}", MonitorWarning)
        return None
    names = ", ".join(repr(sink.name) for sink in keepers)
    warn(f"No sink took the last {len(records)} records ({names}): they are in {file.name}.", MonitorWarning)
    return Path(file.name)
