"""What `torch.compile` traces instead of a solve: one operator, whose arguments are the tensors that it reads."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from deqcore.api import fixed_point
from deqcore.config import Config
from deqcore.errors import BackendError
from deqcore.layer import LayerSettings, explain_arguments, initial_state
from deqcore.solution import Solution
from deqcore.solve.capture import add_compiler
from deqcore.solve.dispatch import backend_named
from deqcore_torch import functorch
from deqcore_torch.disable_dynamo import untraced
from deqcore_torch.exported_state import leaves_like, moved_leaves
from deqcore_torch.layout import (
    at_trace_time,
    autocast_dtype,
    batch_axes,
    describe,
    mapped,
    placeholders,
    rebuilt,
    rows_shape,
    wanted,
)

try:
    from deqcore_torch import operators  # noqa: F401
except (ImportError, AttributeError):  # PyTorch before 2.6 lacks a part of it
    AVAILABLE = False
else:
    AVAILABLE = True


def solve_function(
    f: Any, z0: Any, args: tuple[Any, ...], overrides: dict[str, Any], batched_args: tuple[int, ...] = ()
) -> Solution | None:
    """Return the solution of `fixed_point` as a graph sees it; the graph breaks if its arguments are not plain trees.

    The compiler traces f as a graph of its own, whose inputs are the tensors of z0 and the arguments, then all tensors
    that f closes over.
    """
    if torch.compiler.is_exporting():
        return _exported(f, z0, args, (None, overrides))
    if transformed():
        return _uncaptured(f, z0, args, overrides, batched_args)
    leaves: list[Tensor] = []
    read: list[Tensor] = []
    moving: list[Tensor] = []
    state, chosen = describe(z0, leaves, named=True), describe(overrides, moving)
    carrying, given = _described(args, batched_args, read)
    if not takes_functions() or state is None or not given or chosen is None or moving or not leaves:
        return _uncaptured(f, z0, args, overrides, batched_args)
    from deqcore_torch.graph_problem import solve_graph  # loads the compiler, which runs here anyway

    count, axes = len(leaves), batch_axes(overrides.get("forward__batch"))

    def body(*tensors: Tensor) -> tuple[Tensor, ...]:
        """Return f(z), behind tensors that stand for the other results of the operator."""
        # The inputs of the graph are its tensors in the order of their first use.
        used = [tensor.view_as(tensor) for tensor in tensors]
        z, like = rebuilt(z0, used[:count]), tensors[0]
        value = leaves_like(f(z, *rebuilt(args, used[count:])), z, checked=False)
        return (*placeholders(like, rows_shape(like, axes)), *value)

    # Equal tensors are one input of the graph, and f may also read those of z0.
    start = [leaf.clone() for leaf in leaves]
    outputs = solve_graph(body, *start, *read, layout=f"({state}, {chosen}, {carrying})", leaves=count)
    return _solution(z0, list(outputs))


@untraced
def _uncaptured(
    f: Any, z0: Any, args: tuple[Any, ...], overrides: dict[str, Any], batched_args: tuple[int, ...]
) -> Solution:
    """Solve in Python: the compiler breaks its graph here, or names the reason."""
    return fixed_point(f, z0, *args, batched_args=batched_args, **overrides)


def _described(args: tuple[Any, ...], batched_args: tuple[int, ...], read: list[Tensor]) -> tuple[list[int], bool]:
    """Append the tensors of the arguments; return where those with the batch axis are, and whether all are trees.

    Equal tensors would be one input of the graph, which moves positions, so that the later ones are copied.
    """
    carrying: list[int] = []
    plain = all(i in range(len(args)) for i in batched_args)  # an eager call names the error
    for i, arg in enumerate(args):
        tensors: list[Tensor] = []
        plain = describe(arg, tensors, named=True) is not None and plain
        for tensor in tensors:
            if i in batched_args:
                carrying.append(len(read))
            again = any(tensor is other for other in read)
            read.append(tensor.clone() if again and batched_args else tensor)
    return carrying, plain


class Layer(Protocol):
    """What the compiler reads of a layer."""

    cell: Any
    number: int
    settings: LayerSettings
    training: bool


def solve_layer(layer: Layer, inputs: tuple[Any, ...], z0: Any) -> Solution | None:
    """Return the solution of a layer as a graph sees it, or None if its arguments are not trees of plain containers.

    The report is in tensors; `state`, `record` and `fz` are None.
    """
    if not torch.compiler.is_exporting() and (not AVAILABLE or transformed()):
        return None
    start = initial_state(layer.cell, inputs, _zeros) if z0 is None else z0
    if torch.compiler.is_exporting():
        return _exported_layer(layer, start, inputs)
    leaves: list[Tensor] = []
    read: list[Tensor] = []
    state, given = describe(start, leaves), describe(inputs, read)
    if state is None or given is None or not leaves:
        return None
    tensors = leaves + read + own_tensors(layer.cell)
    layout = f"({state}, {given})"
    anchor = torch.empty((0,), device=leaves[0].device)
    recording, narrow = torch.is_grad_enabled(), autocast_dtype(leaves[0])
    outputs = torch.ops.deqcore.solve(
        anchor, tensors, layer.number, layout, len(leaves), wanted(tensors), recording, narrow, z0 is None
    )
    return _solution(start, list(outputs))


def _exported_layer(layer: Layer, start: Any, inputs: tuple[Any, ...]) -> Solution | None:
    if layer.training:
        raise BackendError(
            "A layer in training mode cannot be exported, because the exported program has no backward pass. Call "
            "model.eval() first."
        )
    cell, call = layer.cell, layer.settings.call(False)
    if torch.compiler.is_dynamo_compiling():
        return _exported(cell, start, inputs, call)
    with explain_arguments(getattr(cell, "forward", cell), inputs, type(cell).__name__):
        return _exported(cell, start, inputs, call)


def _exported(f: Any, z0: Any, args: tuple[Any, ...], call: tuple[Config | None, dict[str, Any]]) -> Solution | None:
    """Return the solution as plain operators of an exported program."""
    from deqcore_torch import exported

    if transformed():
        raise BackendError(
            "An exported program has no derivative and no batching rule of a solve (got a transform of torch.func "
            "around it). Leave the transform out of the export, or compile it with torch.compile."
        )
    leaves: list[Tensor] = []
    if describe(z0, leaves, named=True) is None or not leaves:
        return None
    given = exported.Numbers(*exported.numbers(*call, moved_leaves(z0)[0].dtype))
    value, residual, status, steps, evaluations = exported.solve(f, z0, args, given)
    describe(args, leaves, named=True)
    value = mapped(lambda leaf: exported.underivable(leaf, leaves), value)
    return _reported(value, residual, status, steps, evaluations)


def _solution(like: Any, outputs: list[Tensor]) -> Solution:
    """Return the results of the operator as a solution whose value is a tree like `like`."""
    _, residual, status, steps, evaluations, *values = outputs
    return _reported(rebuilt(like, list(values)), residual, status, steps, evaluations)


def _reported(value: Any, residual: Tensor, status: Tensor, steps: Tensor, evaluations: Tensor) -> Solution:
    leaves: list[Tensor] = []
    describe(value, leaves, named=True)
    return Solution(
        value=value,
        residual=residual.detach(),
        status=status,
        steps=steps,
        evaluations=evaluations,
        state=None,
        backend=backend_named("torch"),
        z=rebuilt(value, [leaf.detach() for leaf in leaves]),
    )


def own_tensors(cell: Any) -> list[Tensor]:
    """Return the parameters and buffers of a cell in the order of `layer_problem.names`."""
    if not isinstance(cell, torch.nn.Module):
        return []
    return [p for _, p in cell.named_parameters()] + [b for _, b in cell.named_buffers()]


@at_trace_time
def transformed() -> bool:
    """Return whether a transform of `torch.func` runs here, inside of the compiled code.

    The operator has no derivative and no batching rule for one. Forward mode would silently give zero tangents. The
    graph breaks instead, and PyTorch runs the whole transform without compiling it.
    """
    return functorch.active()


@at_trace_time
def takes_functions() -> bool:
    """Load the backend, which a compiler cannot, and return whether this PyTorch can hand f over as a graph."""
    backend_named("torch")
    return AVAILABLE and find_spec("torch._higher_order_ops.base_hop") is not None


def _zeros(tree: Any) -> Any:
    return mapped(torch.zeros_like, tree)


if AVAILABLE:
    backend_named("torch")  # loaded here, because a compiler cannot trace the import
    add_compiler(torch.compiler.is_compiling, solve_function)
