"""Trees of tensors by optree, which also knows the classes that `torch.utils._pytree` knows.

A class that is registered with PyTorch only is registered with optree when it is first seen, in a namespace of its
own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import optree
from torch import Tensor

from deqcore.types import Tree
from deqcore_torch.disable_dynamo import untraced

NAMESPACE: Final = "deqcore"
LEAF: Final = optree.tree_structure(0)  # the structure of a bare tensor, the usual state: found without optree


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Split a tree into its leaves and its structure."""
    if isinstance(tree, Tensor):
        return [tree], LEAF
    return _flattened(tree)


@untraced  # the compiler has an optree of its own, whose structures equal none of the real ones
def _flattened(tree: Tree) -> tuple[list[Any], Any]:
    leaves, structure = optree.tree_flatten(tree, namespace=NAMESPACE)
    if any(_adopt(type(leaf)) for leaf in leaves if not isinstance(leaf, Tensor)):
        return _flattened(tree)
    return leaves, structure


def unflatten(structure: Any, leaves: Sequence[Any]) -> Any:
    """Undo `flatten`."""
    return leaves[0] if structure is LEAF else _unflattened(structure, leaves)


@untraced
def _unflattened(structure: Any, leaves: Sequence[Any]) -> Any:
    return optree.tree_unflatten(structure, leaves)


def tree_map(f: Callable[[Any], Any], tree: Tree) -> Any:
    """Return a tree with f of each leaf."""
    leaves, structure = flatten(tree)
    return unflatten(structure, [f(leaf) for leaf in leaves])


def _adopt(kind: type) -> bool:
    """Register a class with optree if only PyTorch knows it, and return whether that was so."""
    pytree = sys.modules.get("torch.utils._pytree")
    node = None if pytree is None else pytree.SUPPORTED_NODES.get(kind)
    if node is None:
        return False

    def split(value: Any) -> tuple[Any, Any]:
        children, context = node.flatten_fn(value)
        return tuple(children), context

    optree.register_pytree_node(
        kind, split, lambda context, children: node.unflatten_fn(list(children), context), namespace=NAMESPACE
    )
    return True
