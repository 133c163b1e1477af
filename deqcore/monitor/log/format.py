"""Records as lines of JSON and back: the format of the log that `watch` and `report` read.

The first line of a run is a header, {"kind": "run", "version": 3, ...}; every other line is a row (kind "row") or an
event. Rows and events carry the "run" of their header, since several processes may write to one log. Infinite values
are the strings "inf" and "-inf", so that every line is strict JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from deqcore.monitor.depths import BOUNDS
from deqcore.monitor.sink import Event, Record, Row, RunInfo
from deqcore.monitor.text import plain, printable

VERSION: Final = 3
READ: Final = (1, 2, 3)
"""Versions that are read: 1 has no settings of layers, 2 no distribution of depths."""
_HEAD: Final = frozenset({"kind", "step", "solve", "time", "name", "run", "settings", "depths"})
MOST: Final = 2**53  # larger integers are not exact in float64


def header(run: RunInfo, key: str = "") -> str:
    """Return the line that begins a run; the run's other lines have its key, too."""
    units = {name: metric.unit for name, metric in run.metrics.items()}
    return _dump(
        {"kind": "run", "version": VERSION, "time": run.started, "units": units, "config": run.config} | _of(key)
    )


def line(record: Record, key: str = "") -> str:
    """Return one record as a line, without its end.

    Args:
        record: a row or an event.
        key: of the run that it belongs to.
    """
    if isinstance(record, Row):
        head: dict[str, object] = {"kind": "row", "step": record.step, "solve": record.solve, "time": record.time}
        head |= _of(key)
        if record.name:
            head["name"] = record.name
        if record.settings:
            head["settings"] = dict(record.settings)
        if record.depths:
            head["depths"] = {str(bound): count for bound, count in record.depths.items()}
        return _dump({**record.values, **head})
    event = {"kind": "event", "event": record.kind, "step": record.step, "time": record.time} | _of(key)
    more = {"metric": record.metric, "value": record.value, "action": record.action, "message": record.message}
    return _dump(event | {name: value for name, value in more.items() if value not in ("", None)})


def parse(table: Mapping[str, Any]) -> Record | None:
    """Return the record in a parsed line, or None for a header.

    Raises:
        ValueError: it is not a record.
    """
    kind = table.get("kind")
    try:
        if kind == "run":
            return None
        if kind == "row":
            values = {printable(name): float(value) for name, value in table.items() if name not in _HEAD}
            name = printable(table.get("name", ""))
            settings = plain(table.get("settings", {}))
            head = _count(table, "step"), _count(table, "solve"), float(table["time"])
            depths = dict(_depth(*pair) for pair in dict(table.get("depths", {})).items())
            return Row(*head, values, name, settings if isinstance(settings, dict) else {}, depths)
        if kind == "event":
            value = table.get("value")
            return Event(
                step=_count(table, "step"),
                time=float(table["time"]),
                kind=printable(table["event"]),
                message=printable(table.get("message", "")),
                metric=printable(table.get("metric", "")),
                value=None if value is None else float(value),
                action=printable(table.get("action", "")),
            )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a field is missing or wrong: {error}") from error
    raise ValueError(f"its kind must be 'run', 'row' or 'event' (got {kind!r})")


def _count(table: Mapping[str, Any], name: str) -> int:
    result = int(table[name])
    if abs(result) > MOST:
        raise ValueError(f"{name!r}, which is beyond 2^53")
    return result


def _depth(bound: Any, count: Any) -> tuple[int, int]:
    if int(bound) not in BOUNDS or not 0 <= int(count) <= MOST:
        raise ValueError(f"depths must have a bin's end and a count from 0 to 2^53 (got {bound!r}, {count!r})")
    return int(bound), int(count)


def _of(key: str) -> dict[str, object]:
    return {"run": key} if key else {}


def _dump(table: Mapping[str, object]) -> str:
    return json.dumps(plain(dict(table)), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
