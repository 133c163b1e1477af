"""The initial iterate of a layer: zeros, or the equilibrium of the solve before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deqcore.types import Tree


def warm(cold: Tree, last: list[Any], fresh: Tensor | None, *, mean: bool) -> Tree:
    """Return the last equilibrium as an initial iterate, or `cold` where the shapes do not allow it.

    Args:
        cold: the initial iterate of a cold start.
        last: the leaves of the last equilibrium.
        fresh: samples that start cold nevertheless, `(batch,)` of bool, or None.
        mean: start every sample from the mean of the last batch, which may have another size.
    """
    from deqcore_torch import trees

    leaves, structure = trees.flatten(cold)
    if len(last) != len(leaves):
        return cold
    if mean:
        last = [
            kept.mean(0, keepdim=True).expand(len(leaf), *kept.shape[1:]) if _moves(leaf) else leaf
            for leaf, kept in zip(leaves, last, strict=True)
        ]
    pairs = list(zip(leaves, last, strict=True))
    if any(leaf.shape != kept.shape for leaf, kept in pairs if _moves(leaf)):
        return cold
    starts = [kept.to(leaf) if _moves(leaf) else leaf for leaf, kept in pairs]
    if fresh is not None:
        starts = [
            _select(fresh, leaf, start) if _moves(leaf) else leaf for leaf, start in zip(leaves, starts, strict=True)
        ]
    return trees.unflatten(structure, starts)


def zeros_like(tree: Tree) -> Tree:
    """Return a tree of zeros."""
    if isinstance(tree, Tensor):
        return torch.zeros_like(tree)
    from deqcore_torch import trees  # with optree, which the first solve imports

    return trees.tree_map(torch.zeros_like, tree)


def copies(value: Tree) -> list[Any]:
    """Return copies of the leaves of an equilibrium."""
    from deqcore_torch import trees

    return [copied(leaf) for leaf in trees.flatten(value)[0]]


def copied(leaf: Any) -> Any:
    """Return a copy without gradient, because the caller may write into the value (relu_)."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _moves(leaf: Any) -> bool:
    """Return whether a solver changes this leaf of a state; others are those of the initial iterate."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _select(fresh: Tensor, cold: Any, warm: Any) -> Any:
    """Return rows of `cold` where `fresh`, of `warm` elsewhere."""
    return torch.where(fresh.to(cold.device).reshape(-1, *[1] * (cold.dim() - 1)), cold, warm)
