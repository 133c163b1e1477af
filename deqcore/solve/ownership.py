"""Ownership of an array that f returned: of f, which may write to it at its next call, or of the solver alone.

CPython counts references, which distinguishes a buffer that f keeps from a result that f has released, without a pass
over either. Memory addresses do not: they show a reused buffer only after it has been overwritten.
"""

from __future__ import annotations

import sys
from typing import Final


def references(leaves: list[object]) -> int:
    """Return the number of references to the first leaf, with those of the call itself."""
    return sys.getrefcount(leaves[0])


def _alone() -> int:
    leaf = object()
    leaves = [leaf]
    return references(leaves)


ALONE: Final = _alone()
"""The number of references to a leaf that only a name of the caller and the list of leaves hold."""
