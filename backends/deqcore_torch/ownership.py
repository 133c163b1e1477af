"""Who holds a tensor that f returned: f, which may write to it again at its next call, or the solver alone."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def _references(leaves: list[Any]) -> int:
    return sys.getrefcount(leaves[0])


def _of_a_tensor_of_nobody_else() -> int:
    found = torch.empty(1)
    leaves = [found]
    return _references(leaves)


ALONE = _of_a_tensor_of_nobody_else()


def held(leaves: list[Any]) -> bool:
    """Whether anything but its caller's own names refers to the tensor in `leaves`, or to the one that it views.

    CPython counts references, which tells a buffer that f keeps from a result that f has let go of, at no pass over
    either. Memory addresses do not: they show a reused buffer only once it has been overwritten.
    """
    if _references(leaves) > ALONE:
        return True
    leaf: Tensor = leaves[0]
    # A view's base is held by the view and by this expression.
    return leaf._is_view() and sys.getrefcount(leaf._base) > ALONE - 1
