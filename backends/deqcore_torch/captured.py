"""What `torch.compile` traces instead of a solve: one operator, whose arguments are all tensors that the solve reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deqcore.layer import initial_state
from deqcore.solution import Solution
from deqcore.solve.dispatch import backend_named
from deqcore_torch.layout import describe

try:
    from deqcore_torch import operators
    from deqcore_torch.layer_problem import LayerProblem
except (ImportError, AttributeError):  # PyTorch before 2.6 lacks a part of torch.library
    AVAILABLE = False
else:
    AVAILABLE = True

if TYPE_CHECKING:
    from deqcore_torch.nn import DEQ


def number_of(layer: DEQ) -> int:
    """Return a new number by which compiled code finds the layer; 0 if this PyTorch has no means for it."""
    backend_named("torch")  # loaded here, because a compiler cannot trace the import
    return operators.register(LayerProblem(layer), layer) if AVAILABLE else 0


def solve_layer(layer: DEQ, inputs: tuple[Any, ...], z0: Any) -> Solution | None:
    """Return the solution of a layer as a graph sees it, or None if its arguments are not trees of plain containers.

    The report is in tensors; `state`, `record` and `fz` are None.
    """
    if not layer.number:
        return None
    start = initial_state(layer.cell, inputs, _zeros) if z0 is None else z0
    leaves: list[Tensor] = []
    read: list[Tensor] = []
    state, given = describe(start, leaves), describe(inputs, read)
    if state is None or given is None or not leaves:
        return None
    tensors = leaves + read + own_tensors(layer.cell)
    warm = z0 is None
    found = torch.ops.deqcore.solve(
        tensors, layer.number, f"({state}, {given})", len(leaves), _wanted(tensors), autocast_dtype(leaves[0]), warm
    )
    _, residual, status, steps, evaluations, *values = found
    return Solution(
        value=rebuilt(start, list(values)),
        residual=residual.detach(),
        status=status,
        steps=steps,
        evaluations=evaluations,
        state=None,
        backend=backend_named("torch"),
        z=rebuilt(start, [v.detach() for v in values]),
    )


def own_tensors(cell: Any) -> list[Tensor]:
    """Return the parameters and buffers of a cell in the order of `layer_problem.names`."""
    if not isinstance(cell, torch.nn.Module):
        return []
    return [p for _, p in cell.named_parameters()] + [b for _, b in cell.named_buffers()]


def _wanted(tensors: list[Tensor]) -> list[int]:
    if not torch.is_grad_enabled():
        return []
    return [i for i, tensor in enumerate(tensors) if tensor.requires_grad]


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """Return the dtype of automatic mixed precision on the device of `like`, or None where it is off."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _zeros(tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return torch.zeros_like(tree)
    if isinstance(tree, dict):
        return {key: _zeros(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_zeros(value) for value in tree])
    return tree


def rebuilt(tree: Any, values: list[Tensor]) -> Any:
    """Return a tree like `tree` with the next of `values` for each tensor, which it removes from the list."""
    if isinstance(tree, Tensor):
        return values.pop(0)
    if isinstance(tree, dict):
        return {key: rebuilt(value, values) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([rebuilt(value, values) for value in tree])
    return tree
