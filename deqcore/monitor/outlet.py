"""All sinks of a monitor together, with what goes to them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from deqcore.monitor.guard import Guard, rescue
from deqcore.monitor.settings import SinkLike, make_sink
from deqcore.monitor.sink import Event, Record, Row, Run
from deqcore.monitor.tell import tell
from deqcore.monitor.text import encodable


class Outlet:
    """Writes records to every sink; a failure in one becomes an event in the others.

    Args:
        sinks: what `make_sink` takes.
        run: what the sinks are told.

    Raises:
        ConfigError: a sink's options do not fit.
        MissingExtraError: a package that a sink needs is not installed.
    """

    def __init__(self, sinks: Iterable[SinkLike], run: Run) -> None:
        self.run = run
        self.guards = [Guard(*make_sink(sink), self._tell) for sink in sinks]
        self._step = 0
        self._events: list[Event] = []
        self._unsaid: list[str] = []

    def write(self, step: int, records: Iterable[Record]) -> None:
        """Offer records to all sinks, with the events of failures up to here."""
        self._step = step
        told, self._events = self._events, []
        everything = [_encodable(record) for record in (*told, *records)]
        for guard in self.guards:
            guard.write(self.run, everything)
        self._say()

    def close(self) -> None:
        """Write what is left, close the sinks, and rescue what none of them took."""
        self.write(self._step, ())
        for guard in self.guards:
            guard.close()
        rescue(self.run, self.guards)
        self._say()

    def _tell(self, text: str) -> None:
        self._events.append(Event(self._step, time.time(), "sink", text))
        self._unsaid.append(text)

    def _say(self) -> None:
        """Warn, once every sink has its records: the user's filters may turn a warning into an error."""
        unsaid, self._unsaid = self._unsaid, []
        for text in unsaid:
            tell(text)


def _encodable(record: Record) -> Record:
    """The record with text that every sink can write: labels are the user's, and messages quote what failed."""
    if isinstance(record, Row):
        return record if encodable(record.name) == record.name else replace(record, name=encodable(record.name))
    return record if encodable(record.message) == record.message else replace(record, message=encodable(record.message))
