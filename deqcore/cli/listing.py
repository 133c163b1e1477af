"""Rows for the listings of registered dataclasses and their options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, is_dataclass
from typing import Any

from deqcore import plugins
from deqcore.errors import PluginError
from deqcore.options import is_required, options_of, plain
from deqcore.plugins import Kind, Spec


def rows(kind: Kind, specs: Iterable[Spec], facts: Mapping[str, str]) -> list[dict[str, object]]:
    """Return one row per spec; a target that cannot be imported gives the status "broken".

    Args:
        kind: of the records.
        specs: the records.
        facts: column of the listing -> attribute of the class.
    """
    return [_row(kind, spec, facts) for spec in specs]


def _row(kind: Kind, spec: Spec, facts: Mapping[str, str]) -> dict[str, object]:
    row: dict[str, object] = {
        "name": spec.name,
        "summary": spec.summary,
        "target": spec.target,
        "status": "ok",
    }
    try:
        cls: Any = plugins.load(kind, spec.name)
    except PluginError as error:
        return row | {"status": "broken", "reason": str(error), "options": {}}
    available = {column: getattr(cls, attribute, None) for column, attribute in facts.items()}
    return row | available | {"options": options(cls)}


def options(cls: type) -> dict[str, object]:
    """Return the options of a solver or strategy with their defaults; one without a default is "required"."""
    return {name: _default(field) for name, field in options_of(cls).items()} if is_dataclass(cls) else {}


def _default(field: Field[Any]) -> object:
    if is_required(field):
        return "required"
    return plain(field.default if field.default_factory is MISSING else field.default_factory())
