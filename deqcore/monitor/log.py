"""Reading a log that the sink `jsonl` writes: all at once, or as it grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deqcore.errors import MonitorError
from deqcore.monitor.lines import VERSION, parse
from deqcore.monitor.sink import Event, Row


@dataclass
class Log:
    """What a log says of its latest run.

    The sink appends, so a file may hold several runs. One that goes on where the last one stopped (its steps are
    higher: a training that was resumed) counts as the same; otherwise what came before is left out.

    Attributes:
        rows: in the order of the file.
        events: in the order of the file.
        units: by metric, from the latest header.
        config: from the latest header.
        runs: how many headers there are.
        left_out: how many of them begin what was left out.
        problems: lines that could not be read, one sentence each.
    """

    path: Path
    rows: list[Row] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    runs: int = 0
    left_out: int = 0
    problems: list[str] = field(default_factory=list)
    _head: tuple[int, int] = field(default=(0, 0), init=False, repr=False)

    @property
    def retrain(self) -> Event | None:
        """The first event that set the retrain mark in the latest run."""
        return next((event for event in self.events if event.kind == "retrain"), None)

    @property
    def solves(self) -> int:
        """How many rows tell of a forward solve."""
        return sum("deq_forward_steps" in row.values for row in self.rows)

    def begin(self) -> None:
        """Note that a header stands here."""
        self.runs += 1
        self._head = len(self.rows), len(self.events)

    def add(self, row: Row) -> None:
        """Take a row; the first one after a header tells whether its run goes on or begins anew."""
        rows, events = self._head
        if 0 < rows == len(self.rows) and row.step <= self.rows[-1].step:
            del self.rows[:rows], self.events[:events]
            self.left_out = self.runs - 1
            self._head = 0, 0
        self.rows.append(row)


class Tail:
    """Follows a log as it grows; a line is taken once it has ended.

    Args:
        path: the file.

    Raises:
        MonitorError: there is no such file, or it is no log of the monitor.
    """

    def __init__(self, path: str | Path) -> None:
        self.log = Log(Path(path))
        self._offset = 0
        self._line = 0
        self._rest = b""
        self.poll()

    def poll(self) -> bool:
        """Read what is new; returns whether anything was."""
        path = self.log.path
        try:
            if path.stat().st_size < self._offset:  # written anew
                self.log, self._offset, self._line, self._rest = Log(path), 0, 0, b""
            with path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            raise MonitorError(
                f"There is no log {str(path)!r}. The sink 'jsonl' writes it while a Monitor runs; its option path, by "
                f"default 'monitor.jsonl', says where."
            ) from None
        except OSError as error:
            raise MonitorError(f"The log {str(path)!r} cannot be read: {error.strerror}.") from None
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line)
        return bool(lines)

    def finish(self) -> Log:
        """The log, with what is left of a torn last line told."""
        if self._rest.strip():
            self._line += 1
            if not self.log.runs and not self.log.rows:
                raise _no_log(self.log.path, self._line, "it is torn")
            self.log.problems.append(f"Line {self._line}, the last one, is torn: the process was stopped in mid-write.")
        return self.log

    def _take(self, line: bytes) -> None:
        self._line += 1
        if not line.strip():
            return
        try:
            table = json.loads(line)
            if not isinstance(table, dict):
                raise ValueError("it is no JSON object")
            record = parse(table)
        except ValueError as error:  # JSON and UTF-8 errors are ValueErrors, too
            if self._line == 1:
                raise _no_log(self.log.path, 1, str(error)) from None
            self.log.problems.append(f"Line {self._line} was left out: {error}.")
            return
        if record is None:
            self._begin(table)
        elif isinstance(record, Row):
            self.log.add(record)
        else:
            self.log.events.append(record)

    def _begin(self, header: dict[str, object]) -> None:
        if header.get("version") != VERSION:
            raise MonitorError(
                f"The log {str(self.log.path)!r} is of version {header.get('version')!r}, but this deqcore reads "
                f"version {VERSION}: use the deqcore that wrote it, or write a new log."
            )
        units, config = header.get("units"), header.get("config")
        self.log.begin()
        self.log.units |= units if isinstance(units, dict) else {}
        self.log.config = config if isinstance(config, dict) else {}


def read(path: str | Path) -> Log:
    """The whole log.

    Raises:
        MonitorError: there is no such file, it is no log of the monitor, or of another version.
    """
    return Tail(path).finish()


def series(rows: list[Row]) -> Iterator[tuple[str, str, list[int], list[float]]]:
    """Metric, layer, steps and values of everything in `rows`, in the order of first appearance."""
    found: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for row in rows:
        for metric, value in row.values.items():
            steps, values = found.setdefault((metric, row.name), ([], []))
            steps.append(row.step)
            values.append(value)
    for (metric, layer), (steps, values) in found.items():
        yield metric, layer, steps, values


def _no_log(path: Path, line: int, reason: str) -> MonitorError:
    return MonitorError(
        f"{str(path)!r} is no log of the monitor (line {line}: {reason}). A log is what the sink 'jsonl' writes."
    )
