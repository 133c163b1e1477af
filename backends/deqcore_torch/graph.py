"""The tensors that f depends on, from the recorded graph of f."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

COMPILED: Final = (
    "CompiledFunctionBackward"  # the node of code that AOTAutograd compiled, with every backend but "eager"
)

ONCE: Final = "torch::autograd::Error"  # the node behind gradients that `once_differentiable` let out


Edge: TypeAlias = tuple[Any, int]  # a node of the graph, and the number of its output


@dataclass
class Outside:
    """Tensors from outside f that its value depends on.

    Attributes:
        leaves: leaf tensors that f closes over.
        ends: where the graph leaves f, by the `key` of the tensor there; z is left out.
        hidden: name of a node that was made before f ran: f closes over a tensor with its own history.
        direct: whether f reads an argument with a history, but not as its alias.
        compiled: whether f, or a part of it, is compiled code with its own backward.
    """

    leaves: list[Tensor] = field(default_factory=list)
    ends: dict[Any, GradientEdge] = field(default_factory=dict)
    hidden: str | None = None
    direct: bool = False
    compiled: bool = False


def leaf_of(node: Any) -> Tensor | None:
    """Return the leaf tensor that a node accumulates into; a user's Function may have an attribute of that name."""
    return node.variable if type(node).__name__ == "AccumulateGrad" else None


def name_of(node: Any) -> str:
    """Return the name of a node; a user's Function may have an attribute of that name."""
    return str(type(node).name(node))


def key(tensor: Tensor) -> Any:
    """Return what identifies a tensor in the graph; a saved one with a history is another object."""
    return id(tensor) if tensor.is_leaf else (tensor.grad_fn, tensor.output_nr)


def sequence() -> int:
    """Return a number below those of all graph nodes made from now on in this thread."""
    with torch.enable_grad():
        probe = torch.zeros((), requires_grad=True).view(())
    return int(probe.grad_fn._sequence_nr())  # type: ignore[union-attr]


def outside(
    y: Tensor, z: Tensor, sources: Sequence[Tensor], made: range, aliases: Mapping[Edge, Edge] | None = None
) -> Outside:
    """Walk the graph of y back to z, to the sources and to nodes that f did not make.

    Args:
        y: the value of f.
        z: its argument z.
        sources: tensors among the arguments of f.
        made: numbers of the nodes that this thread made during f; each thread counts its own nodes.
        aliases: edges of the aliases that f got instead of sources, and those of the sources.
    """
    aliases = aliases or {}
    # Edges, not nodes: a sibling of a source (two outputs of one `unbind`) is not the source.
    known = {key(source) for source in sources}
    seen: set[Any] = {(z.grad_fn, z.output_nr)}
    result = Outside()
    stack: list[Edge] = [(y.grad_fn, y.output_nr)]
    while stack:
        edge = stack.pop()
        if edge in seen or edge[0] is None:
            continue
        seen.add(edge)
        node = edge[0]
        if edge in aliases:
            result.ends.setdefault(aliases[edge], GradientEdge(*edge))
        elif edge in known:
            result.ends[edge], result.direct = GradientEdge(*edge), True
        elif node._sequence_nr() in made:
            result.compiled = result.compiled or name_of(node) == COMPILED
            stack.extend(node.next_functions)
        elif (variable := leaf_of(node)) is None:
            result.ends[edge], result.hidden = GradientEdge(*edge), name_of(node)
        elif variable is not z:
            result.ends[id(variable)] = GradientEdge(*edge)
            if id(variable) not in known:
                result.leaves.append(variable)
    return result


def may_lead_to(edges: Iterable[Edge], leaves: set[Any], most: int) -> bool:
    """Return whether these edges lead to one of the nodes of leaves, or to more than `most` nodes."""
    stack = [node for node, _ in edges]
    seen = set(stack)
    while stack and len(seen) <= most:
        for node, _ in stack.pop().next_functions:
            if node in leaves:
                return True
            if node is not None and node not in seen:
                seen.add(node)
                stack.append(node)
    return bool(stack)


def gradients_at(
    y: Tensor,
    ends: Sequence[Tensor | GradientEdge],
    u: Tensor,
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """Return the gradients of y for the cotangent u, in a pass within a pass of the engine.

    `torch.autograd.grad` is the same after checks that take longer than the vjp of a small layer, and a context for
    compiled code, which the outer pass has. It also serves subclasses of Tensor.
    """
    if type(y) is not Tensor:
        return torch.autograd.grad(y, ends, u, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True)
    gradients: Sequence[Tensor | None] = Variable._execution_engine.run_backward(  # type: ignore[attr-defined]
        (y,), (u,), retain_graph, create_graph, tuple(ends), allow_unreachable=True, accumulate_grad=False
    )
    return gradients


def asked_for(node: Any) -> bool:
    """Return whether the pass that runs here forms the gradient that `node` takes."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # PyTorch refuses to say it of a leaf that `torch.autograd.grad` was asked for
        return True


def once_only(gradients: Iterable[Tensor | None], start: int) -> bool:
    """Return whether gradients, made since `start`, come through a Function that is `once_differentiable`.

    Its node raises only if the engine visits it. `torch.autograd.grad` bypasses it on the way to other tensors, and
    would silently return a wrong derivative.
    """
    return any(name_of(node) == ONCE for node in nodes_since(gradients, start))


def has_functions(y: Tensor, start: int) -> bool:
    """Return whether the graph behind y, made since `start`, has a node of a `torch.autograd.Function`.

    Such a node may have a backward that cannot be differentiated and does not say so, as where it detaches.
    """
    return any(isinstance(node, BackwardCFunction) for node in nodes_since([y], start))


def nodes_since(ends: Iterable[Tensor | None], start: int) -> Iterator[Any]:
    """Yield the nodes behind these tensors that were made since `start`, without those of leaves."""
    seen: set[Any] = set()
    stack: list[Any] = [end.grad_fn for end in ends if end is not None]
    while stack:
        node = stack.pop()
        if node is None or node in seen or leaf_of(node) is not None or node._sequence_nr() < start:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def refuse_compiled(y: Tensor, refuse: Callable[[Tensor], Tensor]) -> None:
    """Replace the gradients that leave compiled code in the current pass by `refuse(gradient)`."""
    for node in nodes_since([y], 0):
        if name_of(node) == COMPILED:
            _replace_once(node, refuse)


def _replace_once(node: Any, refuse: Callable[[Tensor], Tensor]) -> None:
    def replaced(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> Any:
        handle.remove()
        if not torch.is_grad_enabled():
            return None
        return tuple(refuse(part) if part is not None and part.requires_grad else part for part in inputs)

    handle = node.register_hook(replaced)
