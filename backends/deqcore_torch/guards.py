"""Guards of the calls of f on tensors, which f may write to, alias and narrow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from deqcore.abc.guards import CallGuards
from deqcore.errors import ProblemError
from deqcore_torch import functorch
from deqcore_torch.disable_dynamo import untraced
from deqcore_torch.eval_context import output_eps
from deqcore_torch.ownership import held

P = ParamSpec("P")
R = TypeVar("R")

_untraced = cache(untraced)


class TorchGuards(CallGuards):
    """Versions of tensors, copies of what others own, and autocast."""

    def autocasting(self, x: Tensor) -> bool:
        return torch.is_autocast_enabled(x.device.type)

    def output_eps(self, x: Tensor) -> float:
        return output_eps(x)

    def holds(self, flag: Tensor) -> bool:
        return bool(functorch.to_numpy(flag.detach().cpu()).all()) if functorch.active() else bool(flag)

    def owned(self, leaves: list[Any]) -> list[Any]:
        return [leaves[0].clone()] if isinstance(leaves[0], Tensor) and held(leaves) else leaves

    def unshared(self, x: Tensor, other: Tensor) -> Tensor:
        if functorch.active() or x.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
            return x
        return x.clone()

    def untraced(self, fn: Callable[P, R]) -> Callable[P, R]:
        return _untraced(fn)

    def guard_inplace(self, z: Tensor) -> AbstractContextManager[Tensor]:
        return _Guard(z)

    def keep_random_state(self, x: Tensor) -> AbstractContextManager[None]:
        return torch.random.fork_rng([x.device] if x.is_cuda else [])


class _Guard(AbstractContextManager[Tensor]):
    """See `CallGuards.guard_inplace`. It runs at each evaluation of f; a generator takes longer."""

    __slots__ = ("before", "z")

    def __init__(self, z: Tensor) -> None:
        self.z = z
        self.before = -1 if z.is_inference() else z._version  # inference tensors keep no version

    def __enter__(self) -> Tensor:
        return self.z

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None and self.before >= 0 and self.z._version != self.before:
            raise ProblemError.in_place()
