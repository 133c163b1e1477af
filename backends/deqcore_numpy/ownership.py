"""Who holds an array that f returned: f, which may write to it again at its next call, or the solver alone."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def _references(leaves: list[Any]) -> int:
    return sys.getrefcount(leaves[0])


def _of_an_array_of_nobody_else() -> int:
    found = np.empty(1)
    leaves = [found]
    return _references(leaves)


ALONE = _of_an_array_of_nobody_else()


def held(leaves: list[Any]) -> bool:
    """Whether anything but its caller's own names refers to the array in `leaves`, or to the one that it views.

    CPython counts references, which tells a buffer that f keeps from a result that f has let go of, at no pass over
    either. Memory addresses do not: they show a reused buffer only once it has been overwritten.
    """
    if _references(leaves) > ALONE:
        return True
    base = getattr(leaves[0], "base", None)
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    if base is None:
        return False
    # A view's base is held by the view and by the name `base`; what is no array (a DLPack capsule) has other owners.
    return not isinstance(base, np.ndarray) or sys.getrefcount(base) > ALONE
