"""Checkpoints that compare what they compute again with the value of the call.

PyTorch's own checkpoint trusts that a function computed again gives the same values. If a loop variable, a list or the
mode of a module has changed since the call, the gradient is silently that of another function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import optree
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._C import _current_graph_task_id
from torch.autograd import Variable

from deqcore.errors import ProblemError
from deqcore_torch.eval_context import output_eps

CURE: Final = (
    "The values that f reads must not change before. Pass loop variables and tensors that change through args, and do "
    "not switch modules between train() and eval() in between."
)


def checkpoint(f: Callable[..., Any], *args: Any) -> Any:
    """Return f(*args), whose intermediate results are computed again in the backward pass.

    Its graph keeps two numbers per sample of f(*args) to compare, see `fingerprint`: the values would take the memory
    that a checkpoint saves. f is evaluated to its end, because PyTorch would stop at the last tensor that it needs. The
    numbers are read at the end of the pass, where a device has no other work left.

    Raises:
        ProblemError: (in the backward pass) f returns another value than at the call.
    """
    prints: list[list[tuple[Tensor, Tensor]]] = []
    precision: list[float] = []

    def run(*args: Any) -> Any:
        value = f(*args)
        tensors = [leaf for leaf in optree.tree_leaves(value) if isinstance(leaf, Tensor)]
        leaves = [_real(leaf.detach()) for leaf in tensors if leaf.is_floating_point() or leaf.is_complex()]
        now = [fingerprint(leaf) for leaf in leaves]
        if prints:
            _at_end_of_pass(lambda: _check(now, prints[0], precision))
        else:
            prints.append(now)
            precision.extend(map(output_eps, leaves))
        return value

    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)


def _real(x: Tensor) -> Tensor:
    """Return complex numbers as pairs, whose phase a comparison must see, too."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def largest(x: Tensor) -> Tensor:
    """Return the largest entry of each sample `(batch,)`, 0 of an empty one."""
    return x.reshape(*x.shape[:1], -1).abs().amax(-1) if x.numel() else x.new_zeros(x.shape[:1])


@torch.no_grad()
def fingerprint(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest entry of each sample, and its mean product with fixed waves in units of it, `(batch,)` each.

    A change of all entries by a part of the largest one changes the second number by about the same part.
    """
    size = largest(x)
    if not x.numel():
        return size, size
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.reshape(*x.shape[:1], -1).to(wide)
    count = rows.shape[-1] if rows.dim() > 1 else 1
    waves = torch.arange(1, count + 1, device=x.device, dtype=wide).cos()
    unit = torch.where(size > 0, size, torch.ones_like(size)).to(wide)
    mean = (rows.reshape(-1, count) / unit.reshape(-1, 1)) @ waves / count**0.5
    return size, mean


def _check(now: list[tuple[Tensor, Tensor]], then: list[tuple[Tensor, Tensor]], precision: list[float]) -> None:
    for (size, mean), (size_then, mean_then), eps in zip(now, then, precision, strict=True):
        limit = eps ** (2 / 3)
        other = ((size - size_then).abs() > limit * size_then) | ((mean - mean_then).abs() > limit).reshape(size.shape)
        if bool(other.any()):
            raise ProblemError(
                f"f returned another value in the backward pass than at the call (values of up to "
                f"{float(size.max()):.6g} where the call had {float(size_then.max()):.6g}). A checkpoint evaluates f "
                f"again in the backward pass. {CURE}"
            )


def _at_end_of_pass(check: Callable[[], None]) -> None:
    if _current_graph_task_id() == -1:  # a saved tensor was read outside of a backward pass
        check()
    else:
        Variable._execution_engine.queue_callback(check)  # type: ignore[attr-defined]
