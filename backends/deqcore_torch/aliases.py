"""Aliases of the arguments of f, where a pass through the graph of f can end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from deqcore.abc.backend import Backend
from deqcore.types import Tree
from deqcore_torch.graph import Edge, Outside, key, leaf_of, may_lead_to

WORTH: Final = 512  # numbers of y whose part in a pass takes as long as a node in a walk through the graph


class Aliases:
    """Aliases of the arguments that have a history: the last pass through the graph of f ends at them.

    Hooks of an argument, `retain_grad` and its siblings (two outputs of one `unbind`) are beyond its alias, and get the
    whole gradient once.

    Attributes:
        originals: the arguments.
        edges: for the edge of each alias, that of its argument.
    """

    def __init__(self) -> None:
        self.originals: list[Tensor] = []
        self.edges: dict[Edge, Edge] = {}

    def replace(self, backend: Backend, args: tuple[Tree, ...]) -> tuple[Tree, ...]:
        """Return the arguments with aliases; tensors of other classes or with attributes stay as they are."""
        leaves, structure = backend.flatten(args)
        made: dict[Edge, Tensor] = {}
        for i, leaf in enumerate(leaves):
            if _has_alias(leaf):
                edge = key(leaf)
                if edge not in made:
                    made[edge] = alias = leaf.view_as(leaf)
                    self.originals.append(leaf)
                    self.edges[key(alias)] = edge
                leaves[i] = made[edge]
        return tuple(backend.unflatten(structure, leaves)) if made else args

    def ends(self, tensors: Sequence[Tensor]) -> list[GradientEdge]:
        """Return where passes to these tensors end: at their aliases, if they have some."""
        of = {edge: GradientEdge(*alias) for alias, edge in self.edges.items()}
        return [of.get(key(tensor)) or get_gradient_edge(tensor) for tensor in tensors]

    def stay_apart(self, outside: Outside, size: int) -> bool:
        """Return whether all tensors outside f are known, and a pass from y to them stays within f.

        It leaves f where an alias leads on to a leaf that f reads, too. A walk behind the aliases longer than the pass
        that it saves does not pay, so it ends after one node for every `WORTH` of the `size` numbers of y.
        """
        if outside.hidden is not None or outside.direct or not outside.ends:
            return False
        leaves = {edge.node for edge in outside.ends.values() if leaf_of(edge.node) is not None}
        return not leaves or not may_lead_to(self.edges.values(), leaves, 64 + size // WORTH)


def _has_alias(leaf: Any) -> bool:
    plain = type(leaf) is Tensor and leaf.layout is torch.strided and not leaf.is_nested and not leaf.__dict__
    return plain and leaf.grad_fn is not None
