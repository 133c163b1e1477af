"""Ownership of a NumPy array that f returned, or of the array that it views."""

from __future__ import annotations

import sys

import numpy as np

from deqcore.solve.ownership import ALONE, references


def held(leaves: list[object]) -> bool:
    """Return whether anything but its caller's own names refers to the leaf, or to the array that it views."""
    if references(leaves) > ALONE:
        return True
    base = leaves[0].base if isinstance(leaves[0], np.ndarray) else None
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    if base is None:
        return False
    # The view and the name `base` hold the base of a view; an object other than an array (a DLPack capsule) has owners.
    return not isinstance(base, np.ndarray) or sys.getrefcount(base) > ALONE
