"""Ownership of a tensor that f returned: of f, which may write to it at its next call, or of the solver alone."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def _references(leaves: list[Any]) -> int:
    return sys.getrefcount(leaves[0])


def _of_a_tensor_of_nobody_else() -> int:
    tensor = torch.empty(1)
    leaves = [tensor]
    return _references(leaves)


ALONE = _of_a_tensor_of_nobody_else()


def held(leaves: list[Any]) -> bool:
    """Return whether anything but its caller's own names refers to the tensor in `leaves`, or to the one that it views.

    CPython counts references, which distinguishes a buffer that f keeps from a result that f has released, without a
    pass over either. Memory addresses do not: they show a reused buffer only after it has been overwritten.
    """
    if _references(leaves) > ALONE:
        return True
    leaf: Tensor = leaves[0]
    # The view and this expression hold the base of a view.
    return leaf._is_view() and sys.getrefcount(leaf._base) > ALONE - 1
