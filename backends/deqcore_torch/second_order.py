"""Second derivatives on PyTorch's tape, from the one evaluation y = f(z*, …) that the call recorded.

f is not evaluated in a backward pass. Its derivatives use the values that f read at the call (a loop variable, a list,
the mode of a module), and nothing here refers to f or to its arguments.

The recorded graph gives the gradients of the sources, the tensors outside f that y depends on, as a differentiable
function

    P_s(z, g, sources) = (∂f/∂s)ᵀ u,    u = g + Jᵀu.

`Twice` holds their values. Its backward differentiates P once and gives the part of z to the solution, whose own
backward turns it into gradients of the sources. What it gives is linear in its cotangents and may be differentiated in
them (`_Pushed`), as a Hessian-vector product by the double-backward trick does. Derivatives in anything else are of
order 3, and refused.

A source may be computed from another one: h = tanh(x), where f reads both h and x. `partial` holds all other sources
fixed, so that the path through h counts once; PyTorch itself follows it beyond h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch._C import _current_graph_task_id
from torch.autograd.graph import GradientEdge, get_gradient_edge

from deqcore.errors import StrategyError
from deqcore_torch.functorch import ORDER, Refuse
from deqcore_torch.graph import once_only, sequence
from deqcore_torch.module_hooks import unhooked

ONCE_ONLY: Final = (
    "f contains an autograd.Function whose backward is marked @once_differentiable, and its gradient was "
    "differentiated again: write that backward in differentiable operations and remove the mark."
)

EdgeId: TypeAlias = tuple[int, int]  # id of a node, number of its output


@dataclass(frozen=True, eq=False)
class Recorded:
    """y = f(z, …) with its graph, where this ends, and the differentiable solve for u from g."""

    y: Tensor
    z: Tensor
    ends: Sequence[GradientEdge]
    solve: Callable[[Tensor], Tensor]


def distinct(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that need gradients, each once."""
    unique = {id(t) if t.is_leaf else (id(t.grad_fn), t.output_nr): t for t in reversed(tensors) if t.requires_grad}
    return list(unique.values())[::-1]


def partial(
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    create_graph: bool,
    ends: Sequence[GradientEdge] | None = None,
) -> list[Tensor | None]:
    """Return gradients of the outputs for each source while the others stay fixed; the graph is kept.

    They are taken at `ends`, the edges of the sources or of their aliases.

    The engine itself continues beyond a source towards a source that it is computed from. So hooks on the nodes before
    the sources take the gradients, and zeros continue. A user's hooks on a source run when the engine delivers them.
    """
    if ends is None:
        ends = [get_gradient_edge(source) for source in sources]
    wanted = [(id(edge.node), edge.output_nr) for edge in ends]
    gradients: dict[EdgeId, Tensor] = {}
    passes: list[int] = []  # the first is this one: nested passes visit the same nodes
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None]
    handles = [node.register_prehook(lambda _: passes.append(_current_graph_task_id())) for node in nodes]
    handles += [_collect(node, into, gradients, passes) for node, into in _frontier(nodes, set(wanted))]
    try:
        with unhooked(outputs, sources):
            torch.autograd.grad(
                outputs, ends, cotangents, create_graph=create_graph, retain_graph=True, allow_unused=True
            )
    finally:
        for handle in handles:
            handle.remove()
    return [gradients.get(edge) for edge in wanted]


class Twice(torch.autograd.Function):
    """The gradients of the sources, which can be differentiated once more."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, out: Tensor, g: Tensor, *sources: Tensor) -> Any:
        """Return P at u = `solve(g)`; `out` is the solution as the engine knows it."""
        begun = sequence()
        with torch.enable_grad():
            cotangent = g.detach().requires_grad_()
            u = recorded.solve(cotangent)
            parts = partial([recorded.y], sources, [u], create_graph=True, ends=recorded.ends)
        ctx.set_materialize_grads(False)
        ctx.once = once_only(parts, begun)
        ctx.kept = [part is not None and part.requires_grad for part in parts]
        graph = [part for part, kept in zip(parts, ctx.kept, strict=True) if kept and part is not None]
        ctx.save_for_backward(out, g, recorded.z, cotangent, *sources, *graph)
        ctx.ends = [get_gradient_edge(recorded.z), get_gradient_edge(cotangent), *recorded.ends]
        ctx.count = len(sources)
        return tuple(None if part is None else part.detach() for part in parts)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """Return the gradients for the solution, for g and for the sources."""
        if ctx.once:
            raise StrategyError(ONCE_ONLY)
        out, g, z, inner, *rest = ctx.saved_tensors
        sources, graph = rest[: ctx.count], rest[ctx.count :]
        given = [cotangent for cotangent, kept in zip(cotangents, ctx.kept, strict=True) if kept]
        pairs = [(part, cotangent) for part, cotangent in zip(graph, given, strict=True) if cotangent is not None]
        if not pairs:
            return (None,) * (3 + ctx.count)
        parts, wanted, given = [part for part, _ in pairs], [z, inner, *sources], [value for _, value in pairs]
        if not torch.is_grad_enabled():
            return (None, *partial(parts, wanted, given, create_graph=False, ends=ctx.ends))
        tied = [Refuse.apply(value, value, ORDER) for value in distinct([out, g, *sources])]
        return (None, *_Pushed.apply(parts, wanted, ctx.ends, tied, *tied, *given))


class _Pushed(torch.autograd.Function):
    """The result of the backward of `Twice`, as a function that is linear in its cotangents and differentiable in them.

    A Hessian-vector product by the double-backward trick differentiates it in them only. `tied` are the tensors that
    it depends on besides these, behind nodes that refuse: its derivative in them is of order 3.
    """

    @staticmethod
    def forward(
        ctx: Any,
        parts: list[Tensor],
        wanted: list[Tensor],
        ends: list[GradientEdge],
        tied: list[Tensor],
        *inputs: Tensor,
    ) -> Any:
        begun = sequence()
        given = [tensor.detach().requires_grad_() for tensor in inputs[len(tied) :]]
        with torch.enable_grad():
            gradients = partial(parts, wanted, given, create_graph=True, ends=ends)
        ctx.set_materialize_grads(False)
        ctx.once = once_only(gradients, begun)
        ctx.kept = [part is not None and part.requires_grad for part in gradients]
        graph = [part for part, kept in zip(gradients, ctx.kept, strict=True) if kept and part is not None]
        ctx.save_for_backward(*inputs[: len(tied)], *given, *graph)
        ctx.ends = len(tied), len(inputs)
        return tuple(None if part is None else part.detach() for part in gradients)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """Return zeros for the tensors whose nodes refuse them, and the gradients for the cotangents."""
        if ctx.once:
            raise StrategyError(ONCE_ONLY)
        start, end = ctx.ends
        saved = ctx.saved_tensors
        tied, given, graph = saved[:start], saved[start:end], saved[end:]
        taken = [cotangent for cotangent, kept in zip(cotangents, ctx.kept, strict=True) if kept]
        pairs = [(part, cotangent) for part, cotangent in zip(graph, taken, strict=True) if cotangent is not None]
        gradients: Sequence[Tensor | None] = [None] * len(given)
        if pairs:
            outputs, weights = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(outputs, given, weights, retain_graph=True, allow_unused=True)
        if torch.is_grad_enabled():
            gradients = [_refused(part, [*tied, *(cotangent for _, cotangent in pairs)]) for part in gradients]
        return (None, None, None, None, *map(_zeros, tied), *gradients)


def _refused(part: Tensor | None, tensors: Sequence[Tensor]) -> Tensor | None:
    """Return `part`, whose derivative in any of `tensors` is refused."""
    for tensor in distinct(tensors) if part is not None else []:
        part = Refuse.apply(part, tensor, ORDER)
    return part


def _frontier(nodes: Sequence[Any], wanted: set[EdgeId]) -> list[tuple[Any, dict[int, EdgeId]]]:
    """Return the nodes with edges into the sources, and which of their edges these are."""
    stack: list[Any] = list(nodes)
    visited: dict[int, Any] = {}  # keeps the nodes alive, so that their ids stay unique
    frontier = []
    while stack:
        node = stack.pop()
        if node is None or id(node) in visited:
            continue
        visited[id(node)] = node
        into: dict[int, EdgeId] = {}
        for i, (following, output) in enumerate(node.next_functions):
            if (id(following), output) in wanted:
                into[i] = (id(following), output)
            else:
                stack.append(following)
        if into:
            frontier.append((node, into))
    return frontier


def _collect(node: Any, into: dict[int, EdgeId], sums: dict[EdgeId, Tensor], passes: list[int]) -> Any:
    def collect(gradients: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...] | None:
        if _current_graph_task_id() != passes[0]:
            return None
        left = list(gradients)
        for i, edge in into.items():
            part = left[i]
            if part is not None:
                sums[edge] = sums[edge] + part if edge in sums else part
                left[i] = _zeros(part)  # a user's hook cannot take None
        return tuple(left)

    return node.register_hook(collect)


def _zeros(part: Tensor) -> Tensor:
    """Return zeros like a gradient, without memory if it is dense."""
    return part.new_zeros(()).expand(part.shape) if part.layout is torch.strided else torch.zeros_like(part)
