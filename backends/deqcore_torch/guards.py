"""Guards of the calls of f on tensors, which f may write to, alias and narrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from deqcore.abc.guards import CallGuards
from deqcore.errors import ProblemError
from deqcore_torch import functorch
from deqcore_torch.ownership import held


class TorchGuards(CallGuards):
    """Versions of tensors, copies of what others own, and autocast."""

    def autocasting(self, x: Tensor) -> bool:
        return torch.is_autocast_enabled(x.device.type)

    def output_eps(self, x: Tensor) -> float:
        kind = x.device.type
        narrowed = x.dtype is torch.float32 and torch.is_autocast_enabled(kind)
        return float(torch.finfo(torch.get_autocast_dtype(kind) if narrowed else x.dtype).eps)

    def owned(self, leaves: list[Any]) -> list[Any]:
        return [leaves[0].clone()] if isinstance(leaves[0], Tensor) and held(leaves) else leaves

    def unshared(self, x: Tensor, other: Tensor) -> Tensor:
        if functorch.active() or x.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
            return x
        return x.clone()

    @contextmanager
    def guard_inplace(self, z: Tensor) -> Iterator[Tensor]:
        if z.is_inference():  # which keeps no version
            yield z
            return
        before = z._version
        yield z
        if z._version != before:
            raise ProblemError.in_place()

    def keep_random_state(self, x: Tensor) -> AbstractContextManager[None]:
        return torch.random.fork_rng([x.device] if x.is_cuda else [])
