"""Records as lines of JSON and back: the format of the log that `watch` and `report` read.

The first line of a run is a header, {"kind": "run", "version": 1, ...}; every other line is a row (kind "row") or an
event. Infinite values are the strings "inf" and "-inf", so that every line is strict JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

from deqcore.monitor.sink import Event, Record, Row, Run

VERSION: Final = 1
_HEAD: Final = frozenset({"kind", "step", "solve", "time", "name"})


def header(run: Run) -> str:
    """The line that begins a run."""
    units = {name: metric.unit for name, metric in run.metrics.items()}
    return _dump({"kind": "run", "version": VERSION, "time": run.started, "units": units, "config": run.config})


def line(record: Record) -> str:
    """One record as a line, without its end."""
    if isinstance(record, Row):
        head: dict[str, object] = {"kind": "row", "step": record.step, "solve": record.solve, "time": record.time}
        if record.name:
            head["name"] = record.name
        return _dump(head | {name: _number(value) for name, value in record.values.items()})
    event = {"kind": "event", "event": record.kind, "step": record.step, "time": record.time}
    more = {"metric": record.metric, "value": record.value, "action": record.action, "message": record.message}
    return _dump(event | {name: _number(value) for name, value in more.items() if value not in ("", None)})


def parse(table: Mapping[str, Any]) -> Record | None:
    """The record in a parsed line, or None for a header.

    Raises:
        ValueError: it is no record.
    """
    kind = table.get("kind")
    try:
        if kind == "run":
            return None
        if kind == "row":
            values = {name: float(value) for name, value in table.items() if name not in _HEAD}
            return Row(
                int(table["step"]), int(table["solve"]), float(table["time"]), values, str(table.get("name", ""))
            )
        if kind == "event":
            value = table.get("value")
            return Event(
                step=int(table["step"]),
                time=float(table["time"]),
                kind=str(table["event"]),
                message=str(table.get("message", "")),
                metric=str(table.get("metric", "")),
                value=None if value is None else float(value),
                action=str(table.get("action", "")),
            )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"it lacks or misstates {error}") from error
    raise ValueError(f"its kind is {kind!r}, not 'run', 'row' or 'event'")


def _number(value: object) -> object:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _dump(table: Mapping[str, object]) -> str:
    return json.dumps(table, ensure_ascii=False, allow_nan=False, default=str, separators=(",", ":"))
