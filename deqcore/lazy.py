"""Names of a package that are imported when they are first used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TypeAlias

Finder: TypeAlias = Callable[[str], object]
Lister: TypeAlias = Callable[[], list[str]]


def lazy_names(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Finder, Lister]:
    """Return the functions `__getattr__` and `__dir__` of a package that imports its names when they are first used.

    Type checkers read the imports of such a package below `if TYPE_CHECKING`.

    Args:
        package: `__name__` of the package.
        homes: the module of each name: lists of names by the full name of their module.

    Example:
        >>> find, names = lazy_names("collections", {"collections.abc": ["Callable"]})
        >>> find("Callable"), "Callable" in names()
        (<class 'collections.abc.Callable'>, True)
    """
    namespace = vars(sys.modules[package])
    modules = {name: module for module, listed in homes.items() for name in listed}

    def find(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(import_module(modules[name]), name)
        namespace[name] = value
        return value

    def names() -> list[str]:
        return sorted({*namespace, *modules})

    return find, names
