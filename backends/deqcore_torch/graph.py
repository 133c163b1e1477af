"""The tensors that f depends on, from the recorded graph of f."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

COMPILED: Final = (
    "CompiledFunctionBackward"  # the node of code that AOTAutograd compiled, with every backend but "eager"
)

ONCE: Final = "torch::autograd::Error"  # the node behind gradients that `once_differentiable` let out


@dataclass
class Outside:
    """Tensors from outside f that its value depends on.

    Attributes:
        leaves: leaf tensors that f closes over.
        hidden: name of a node that was made before f ran: f closes over a tensor with its own history.
        compiled: whether f, or a part of it, is compiled code with its own backward.
    """

    leaves: list[Tensor] = field(default_factory=list)
    hidden: str | None = None
    compiled: bool = False


def sequence() -> int:
    """Return a number below those of all graph nodes made from now on in this thread."""
    with torch.enable_grad():
        probe = torch.zeros((), requires_grad=True).view(())
    return int(probe.grad_fn._sequence_nr())  # type: ignore[union-attr]


def outside(y: Tensor, z: Tensor, sources: list[Tensor], made: range) -> Outside:
    """Walk the graph of y back to z, to the sources and to nodes that f did not make.

    Args:
        y: the value of f.
        z: its argument z.
        sources: tensors among the arguments of f.
        made: numbers of the nodes that this thread made during f; each thread counts its own nodes.
    """
    nodes = [t.grad_fn for t in (z, *sources) if t.grad_fn is not None]  # kept alive: ids stay unique
    # Edges, not nodes: a sibling of a source (two outputs of one `unbind`) is not the source.
    seen = {(id(t.grad_fn), t.output_nr) for t in (z, *sources)}
    source_ids = {id(t) for t in sources}
    result = Outside()
    stack: list[Any] = [(y.grad_fn, y.output_nr)]
    while stack:
        node, output = stack.pop()
        if node is None or (id(node), output) in seen:
            continue
        seen.add((id(node), output))
        nodes.append(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) not in source_ids:
                result.leaves.append(variable)
            continue
        if node._sequence_nr() not in made:
            result.hidden = node.name()
            continue
        result.compiled = result.compiled or node.name() == COMPILED
        stack.extend(node.next_functions)
    return result


def nested(sources: Sequence[Tensor]) -> bool:
    """Return whether one of these tensors, which need gradients, is computed from another one."""
    known = [get_gradient_edge(t) for t in sources]  # a saved leaf is another object with the same edge
    edges = {(edge.node, edge.output_nr) for edge in known}
    before: list[Any] = [t.grad_fn for t in sources if t.grad_fn is not None]
    seen = set(before)
    for node in before:
        for earlier, output in node.next_functions:
            if (earlier, output) in edges:
                return True
            if earlier is not None and earlier not in seen:
                seen.add(earlier)
                before.append(earlier)
    return False


def sources_of(y: Tensor, z: Tensor, made: range) -> list[GradientEdge]:
    """Return where the gradient of y leaves f: parameters, and tensors with a history from before f.

    Args:
        y: the value of f.
        z: its argument z, which is left out.
        made: numbers of the nodes that this thread made during f.
    """
    seen: set[Any] = {(z.grad_fn, z.output_nr)}
    edges: list[GradientEdge] = []
    stack: list[Any] = [(y.grad_fn, y.output_nr)]
    while stack:
        node, output = stack.pop()
        if node is None or (node, output) in seen:
            continue
        seen.add((node, output))
        variable = getattr(node, "variable", None)
        if variable is z:
            continue
        if variable is not None or node._sequence_nr() not in made:
            edges.append(GradientEdge(node, output))
            continue
        stack.extend(node.next_functions)
    return edges


def once_only(gradients: Iterable[Tensor | None], start: int) -> bool:
    """Return whether gradients, made since `start`, come through a Function that is `once_differentiable`.

    Its node raises only if the engine visits it. `torch.autograd.grad` bypasses it on the way to other tensors, and
    would silently return a wrong derivative.
    """
    seen: set[Any] = set()
    stack: list[Any] = [part.grad_fn for part in gradients if part is not None]
    while stack:
        node = stack.pop()
        if node is None or node in seen or node._sequence_nr() < start:
            continue
        if node.name() == ONCE:
            return True
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
    return False


def refuse_compiled(y: Tensor, refuse: Callable[[Tensor], Tensor]) -> None:
    """Replace the gradients that leave compiled code in the current pass by `refuse(gradient)`."""
    seen: set[Any] = set()
    stack: list[Any] = [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == COMPILED:
            _replace_once(node, refuse)
        stack.extend(following for following, _ in node.next_functions)


def _replace_once(node: Any, refuse: Callable[[Tensor], Tensor]) -> None:
    def replaced(inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> Any:
        handle.remove()
        if not torch.is_grad_enabled():
            return None
        return tuple(refuse(part) if part is not None and part.requires_grad else part for part in inputs)

    handle = node.register_hook(replaced)
