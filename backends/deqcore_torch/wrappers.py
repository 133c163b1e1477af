"""Tensors that outlast the levels of `torch.func` in which they were made."""

from __future__ import annotations

from typing import Any

import optree
from torch import Tensor
from torch._C._functorch import is_dead_tensor_wrapper, unwrap_if_dead
from torch.overrides import TorchFunctionMode

from deqcore.types import Map


def outlasting(f: Map) -> Map:
    """Wrap f to run after levels of transformations that are active here have ended.

    `torch.func.vjp` runs its backward pass after it has left its level. The closure of f is then wrapped for levels
    that have ended, and PyTorch would mistake their numbers for those of new levels.
    """

    def again(z: Tensor) -> Tensor:
        with _Alive():
            return f(z)

    return again


class _Alive(TorchFunctionMode):
    """Unwrap tensors from levels that have ended."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = optree.tree_map(alive, (args, kwargs or {}))
        return func(*args, **kwargs)


def alive(leaf: Any) -> Any:
    """Return a tensor without the wrappers of levels that have ended."""
    while isinstance(leaf, Tensor) and is_dead_tensor_wrapper(leaf):
        leaf = unwrap_if_dead(leaf)
    return leaf
