"""Reading a log that the sink `jsonl` writes: all at once, or as it grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deqcore.errors import MonitorError
from deqcore.monitor.log.format import READ, VERSION, parse
from deqcore.monitor.sink import Event, Row
from deqcore.monitor.text import plain, printable


@dataclass
class Log:
    """The records of the latest run in a log.

    The sink appends, so a file may hold several runs. One that continues where the last one stopped (its steps are
    higher: a training that was resumed) counts as the same; otherwise what came before is left out. Runs whose lines
    alternate, from processes that write to one file at the same time, all count.

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
    _latest: str = field(default="", init=False, repr=False)
    _parts: dict[str, _Part] = field(default_factory=dict, init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)

    @property
    def retrain(self) -> Event | None:
        """The first event that set the retrain mark in the latest run."""
        return next((event for event in self.events if event.kind == "retrain"), None)

    @property
    def solves(self) -> int:
        """The number of rows with a forward solve."""
        return sum("deq_forward_steps" in row.values for row in self.rows)

    def begin(self, key: str = "") -> None:
        """Take a header; without a key (older logs) it has the lines up to the next one."""
        self.runs += 1
        self._latest = key or f"run {self.runs}"
        self._parts[self._latest] = _Part(self._count)

    def add(self, record: Row | Event, key: str = "") -> None:
        """Take a row or an event; the first row of a run decides whether it continues or begins again."""
        part = self._parts.setdefault(key or self._latest, _Part(self._count))
        if part.hidden:  # it has not ended: it runs at the same time as the run that seemed to replace it
            part.hidden = False
            self._show()
        if isinstance(record, Row) and not part.began:
            part.began = True
            self._replace(part, record.step)
        part.records.append((self._count, record))
        self._count += 1
        if isinstance(record, Row):
            self.rows.append(record)
        else:
            self.events.append(record)

    def _replace(self, new: _Part, step: int) -> None:
        """Leave out the runs that have written nothing since the header of this one, if it begins again."""
        over = [part for part in self._parts.values() if part is not new and not part.hidden and part.end <= new.start]
        rows = [pair for item in over for pair in item.records if isinstance(pair[1], Row)]
        last = max(rows, key=lambda pair: pair[0], default=None)
        if last is not None and isinstance(last[1], Row) and step <= last[1].step:
            for item in over:
                item.hidden = True
            self._show()

    def _show(self) -> None:
        shown = sorted(
            (pair for part in self._parts.values() if not part.hidden for pair in part.records),
            key=lambda pair: pair[0],
        )
        self.rows[:] = [record for _, record in shown if isinstance(record, Row)]
        self.events[:] = [record for _, record in shown if isinstance(record, Event)]
        self.left_out = sum(part.hidden for part in self._parts.values())


@dataclass
class _Part:
    """The records of one run, with their places among all records."""

    start: int
    records: list[tuple[int, Row | Event]] = field(default_factory=list)
    began: bool = False
    hidden: bool = False

    @property
    def end(self) -> int:
        return self.records[-1][0] + 1 if self.records else self.start


class Tail:
    """Follows a log as it grows; a line is taken once it has ended.

    Args:
        path: the file.

    Raises:
        MonitorError: the file does not exist, or it is not a log of the monitor.
    """

    def __init__(self, path: str | Path) -> None:
        self.log = Log(Path(path))
        self._offset = 0
        self._line = 0
        self._rest = b""
        self.poll()

    def poll(self) -> bool:
        """Read new lines; return whether there were any."""
        path = self.log.path
        try:
            if path.stat().st_size < self._offset:  # rewritten
                self.log, self._offset, self._line, self._rest = Log(path), 0, 0, b""
            with path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            raise MonitorError(
                f"The log {str(path)!r} does not exist. Run a Monitor with the sink 'jsonl', which writes its option "
                f"path ('monitor.jsonl' by default)."
            ) from None
        except OSError as error:
            raise MonitorError(f"The log {str(path)!r} cannot be read: {error.strerror}.") from None
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line)
        return bool(lines)

    def finish(self) -> Log:
        """Return the log; a torn last line becomes one of its problems."""
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
                raise ValueError("it is not a JSON object")
            record = parse(table)
        except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors, too
            if self._line == 1:
                raise _no_log(self.log.path, 1, printable(error)) from None
            self.log.problems.append(f"Line {self._line} was left out: {printable(error)}.")
            return
        if record is None:
            self._begin(table)
        else:
            self.log.add(record, printable(table.get("run", "")))

    def _begin(self, header: dict[str, object]) -> None:
        if header.get("version") not in READ:
            raise MonitorError(
                f"The log {str(self.log.path)!r} is of version {header.get('version')!r}, but this deqcore reads "
                f"versions up to {VERSION}: use the deqcore that wrote it, or write a new log."
            )
        units, config = header.get("units"), header.get("config")
        self.log.begin(printable(header.get("run", "")))
        self.log.units |= {printable(name): printable(unit) for name, unit in _table(units).items()}
        result = plain(_table(config))
        self.log.config = result if isinstance(result, dict) else {}


def read(path: str | Path) -> Log:
    """Read the whole log.

    Raises:
        MonitorError: the file does not exist, is not a log of the monitor, or has another version.
    """
    return Tail(path).finish()


def series(rows: list[Row]) -> Iterator[tuple[str, str, list[int], list[float]]]:
    """Yield the metric, layer, steps and values of everything in `rows`, in the order of first appearance."""
    result: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for row in rows:
        for metric, value in row.values.items():
            steps, values = result.setdefault((metric, row.name), ([], []))
            steps.append(row.step)
            values.append(value)
    for (metric, layer), (steps, values) in result.items():
        yield metric, layer, steps, values


def _table(given: object) -> dict[str, object]:
    return given if isinstance(given, dict) else {}


def _no_log(path: Path, line: int, reason: str) -> MonitorError:
    return MonitorError(
        f"{str(path)!r} is not a log of the monitor (line {line}: {reason}). Use a file that the sink 'jsonl' wrote."
    )
