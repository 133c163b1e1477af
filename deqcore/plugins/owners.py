"""Whose array is it: from the type of an object to the name of a backend."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from deqcore.plugins import specs
from deqcore.plugins.builtin import BUILTIN
from deqcore.plugins.lookup import lock, manager, spec

_owners: Final[dict[type, str | None]] = {}


def backend_of(leaf: object) -> str | None:
    """Return the name of the backend that `leaf` is an array of, or None if it is not an array.

    The modules that define the type and its bases decide; nothing is imported.
    """
    cls = type(leaf)
    if cls not in _owners:
        _owners[cls] = _owner_of(cls)
    return _owners[cls]


def shares_arrays(name: str, leaves: Iterable[object]) -> bool:
    """Return whether the backend of this name also works on these arrays, although another one owns their type.

    A framework over plain NumPy arrays lists `numpy` among its `array_modules`; the config then decides.
    """
    record = spec("backend", name)
    roots = set(record.array_modules) if isinstance(record, specs.BackendSpec) else set()
    return all(roots & {parent.__module__.partition(".")[0] for parent in type(leaf).__mro__} for leaf in leaves)


def _owner_of(cls: type) -> str | None:
    roots = [parent.__module__.partition(".")[0] for parent in cls.__mro__]
    if set(roots) <= {"builtins"}:
        return None
    built_in = _owner(roots, BUILTIN["backend"].values())
    if built_in is not None:
        return built_in
    with lock:
        offers = manager().offers("backend")
    return _owner(roots, [offered[0][0] for offered in offers.values()])


def _owner(roots: list[str], offered: Iterable[specs.Spec]) -> str | None:
    records = [record for record in offered if isinstance(record, specs.BackendSpec)]
    owners = {root: record.name for record in records for root in record.array_modules}
    return next((owners[root] for root in roots if root in owners), None)


def forget() -> None:
    """Empty the cache: another backend may own a type."""
    _owners.clear()
