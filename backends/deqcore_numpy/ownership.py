"""Ownership of an array that f returned: of f, which may write to it at its next call, or of the solver alone."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def _references(leaves: list[Any]) -> int:
    return sys.getrefcount(leaves[0])


def _of_an_array_of_nobody_else() -> int:
    array = np.empty(1)
    leaves = [array]
    return _references(leaves)


ALONE = _of_an_array_of_nobody_else()


def held(leaves: list[Any]) -> bool:
    """Return whether anything but its caller's own names refers to the array in `leaves`, or to the one that it views.

    CPython counts references, which distinguishes a buffer that f keeps from a result that f has released, without a
    pass over either. Memory addresses do not: they show a reused buffer only after it has been overwritten.
    """
    if _references(leaves) > ALONE:
        return True
    base = getattr(leaves[0], "base", None)
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    if base is None:
        return False
    # The view and the name `base` hold the base of a view; an object other than an array (a DLPack capsule) has owners.
    return not isinstance(base, np.ndarray) or sys.getrefcount(base) > ALONE
