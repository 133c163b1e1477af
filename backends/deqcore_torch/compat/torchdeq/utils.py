"""torchdeq's helpers: options of a command line, an initial iterate, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deqcore_torch.compat.torchdeq.config import add_deq_args

__all__ = ["add_deq_args", "mem_gc", "mixed_init"]


def mem_gc(func: Callable[..., Any], in_args: Sequence[Any] | None = None) -> Any:
    """Call a module and compute its activations again in the backward pass instead of keeping them.

    Args:
        func: a module or a function.
        in_args: its arguments.

    Returns:
        What it returns, with its gradient.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> mem_gc(torch.exp, (x,)).sum().backward()
        >>> x.grad.round(decimals=3).tolist()
        [2.7179999351501465, 2.7179999351501465]
    """
    return checkpoint(func, *(in_args or ()), use_reentrant=False)


def mixed_init(z_shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Return an initial iterate of which half the numbers are normal and half are zero.

    Args:
        z_shape: its shape.
        device: its device.

    Source: Anil et al. (2022), "Path independent equilibrium models can better exploit test-time computation".

    Example:
        >>> mixed_init((2, 3)).shape
        torch.Size([2, 3])
    """
    state = torch.randn(*z_shape, device=device)
    return state * torch.zeros_like(state).bernoulli_(0.5)
