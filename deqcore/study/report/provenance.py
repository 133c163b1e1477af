"""Where and when figures were measured. Writing a report again measures nothing and changes none of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from deqcore.study.labels import called
from deqcore.study.translations import say

CHANGING: Final = ("date", "load_before")
"""What differs from training to training on one machine."""


def machines(results: Sequence[Mapping[str, Any]], fallback: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every machine that measured results, each once, with the range of its dates and loads.

    Args:
        results: of the cells; `measured` describes the machine of each.
        fallback: the machine of results that do not say, which older versions wrote.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        machine = dict(result.get("measured") or fallback)
        if "device" in result:
            machine["device"] = result["device"]
        fixed = {name: value for name, value in machine.items() if name not in CHANGING}
        groups.setdefault(json.dumps(fixed, sort_keys=True), []).append(machine)
    return [_together(group) for group in groups.values()] or [dict(fallback)]


def _together(group: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    result = dict(group[0])
    dates = sorted({str(machine["date"]) for machine in group if machine.get("date")})
    loads = [machine["load_before"] for machine in group if machine.get("load_before")]
    if dates:
        result["date"] = dates[0] if len(dates) == 1 else f"{dates[0]} – {dates[-1]}"
    if loads:
        result["load_before"] = [[min(column), max(column)] for column in zip(*loads, strict=True)]
    return result | {"trainings": len(group)}


def facts(machine: Mapping[str, Any], language: str) -> list[tuple[str, str]]:
    """Return a machine as pairs of text."""
    return [(called(language, name), _text(value)) for name, value in machine.items()]


def rendered(language: str) -> str:
    """Say when and by which version the page was written."""
    from deqcore import __version__

    return say(language, "rendered", date=time.strftime("%Y-%m-%d", time.gmtime()), version=__version__)


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(f"{item[0]}–{item[1]}" if isinstance(item, list) else str(item) for item in value)
    return str(value)
