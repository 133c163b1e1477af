"""Ownership of a tensor that f returned, or of the tensor that it views."""

from __future__ import annotations

import sys

from torch import Tensor

from deqcore.solve.ownership import ALONE, references


def held(leaves: list[object]) -> bool:
    """Return whether anything but its caller's own names refers to the leaf, or to the tensor that it views."""
    if references(leaves) > ALONE:
        return True
    leaf = leaves[0]
    # The view and this expression hold the base of a view.
    return isinstance(leaf, Tensor) and leaf._is_view() and sys.getrefcount(leaf._base) > ALONE - 1
