"""A sink that may fail without hurting the training: told once, records kept, offered again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from deqcore.errors import MissingExtraError
from deqcore.monitor.lines import header, line
from deqcore.monitor.sink import Event, Record, Run, Sink
from deqcore.monitor.tell import tell
from deqcore.plugins.lookup import is_installed

LIMIT: Final = 20_000  # records that are kept for a sink that fails


class Guard:
    """Calls a sink and catches what it raises.

    Args:
        name: that the sink is registered under.
        sink: the sink.
        tell: takes the event of a failure, so that the other sinks record it.

    Attributes:
        waiting: records that the sink has not taken yet; the oldest go when there are more than `LIMIT`.
        lost: how many went.

    Raises:
        MissingExtraError: a package that the sink needs is not installed.
    """

    def __init__(self, name: str, sink: Sink, tell: Callable[[str], None]) -> None:
        for package, extra in sink.needs.items():
            if not is_installed(package):
                raise MissingExtraError.of(f"The sink {name!r}", package, extra)
        self.name = name
        self.sink = sink
        self.waiting: list[Record] = []
        self.lost = 0
        self._tell = tell
        self._opened = False
        self._failing = False

    def write(self, run: Run, records: Iterable[Record]) -> None:
        """Offer records, and those that the sink has refused before."""
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
        """Say it when the sink begins to fail, not at every flush."""
        if self._failing:
            return
        self._failing = True
        text = (
            f"The sink {self.name!r} fails: {type(error).__name__}: {error}. Training goes on; up to {LIMIT} records "
            f"are kept and offered again at every flush."
        )
        self._tell(text)


def rescue(run: Run, guards: Sequence[Guard]) -> Path | None:
    """Write what no sink has kept to a log in the temporary folder, at the end of a run.

    Returns:
        The file, or None if nothing was left (or nothing could be written there either, which is warned of).
    """
    keepers = [guard for guard in guards if guard.sink.keeps]
    if not keepers or any(not guard.waiting for guard in keepers):
        return None
    records = max((guard.waiting for guard in keepers), key=len)
    if not any(not isinstance(record, Event) for record in records):
        return None
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="deqcore-monitor-", suffix=".jsonl", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write("\n".join([header(run), *map(line, records)]) + "\n")
    except Exception as error:  # what made the sinks fail may lie in the records
        tell(f"{len(records)} records of the monitor are lost: {error}")
        return None
    names = ", ".join(repr(guard.name) for guard in keepers)
    tell(f"No sink took the last {len(records)} records ({names}): they are in {file.name}.")
    return Path(file.name)
