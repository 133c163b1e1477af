"""The state of an exported or captured solve: which tensors it moves, what f may return, and the state as one matrix.

Compilers trace these functions, so the checks of eager code are repeated here for what they can trace.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deqcore.errors import InitialIterateError, ProblemError, described
from deqcore.solve.dispatch import backend_named
from deqcore.solve.leaves import check_leaf, dtype_of
from deqcore.types import Tree
from deqcore_torch.layout import describe, is_named, mapped


def is_moved(leaf: Tensor) -> bool:
    """Return whether a solver moves this leaf; integers and booleans are carried along as they are in z0."""
    return leaf.is_floating_point() or leaf.is_complex()


def moved_leaves(z0: Tree) -> list[Tensor]:
    """Return the leaves that a solver moves, in order.

    Raises:
        InitialIterateError: there are none.
    """
    leaves = [leaf for leaf in _tensors(z0) if is_moved(leaf)]
    if not leaves:
        raise InitialIterateError(
            "The initial iterate z0 must hold at least one tensor of a floating-point or complex dtype (got none). "
            "Cast z0 first."
        )
    return leaves


def check_state(z0: Tree, batch: bool) -> None:
    """Check the initial iterate by the rules of eager code.

    Raises:
        InitialIterateError: no leaf is moved, precisions differ, an axis is missing, or batch sizes differ.
    """
    leaves = moved_leaves(z0)
    if torch.compiler.is_dynamo_compiling():
        return  # with strict = True the compiler traces this code, and cannot trace the checks
    backend = backend_named("torch")
    for leaf in leaves:
        check_leaf(backend, leaf, int(batch))
    dtype_of({backend.dtype_name(leaf) for leaf in leaves})
    if batch and any(leaf.shape[0] != leaves[0].shape[0] for leaf in leaves):
        raise InitialIterateError(
            f"With forward.batch = true the first axis of every leaf is the batch, so the leaves must have the same "
            f"number of rows (got the shapes {[tuple(leaf.shape) for leaf in leaves]}). Give them one batch size, or "
            f"set forward.batch = false."
        )


def leaves_like(value: Tree, z: Tree, *, checked: bool = True) -> list[Tensor]:
    """Return the tensors of f(z) in the order of those of z; carried leaves are those of z.

    Args:
        value: f(z).
        z: the state.
        checked: whether to check shapes and dtypes, too; else the solve does it.

    Raises:
        ProblemError: the value is not a tree like z, or a tensor has another shape or dtype.
    """
    leaves: list[Tensor] = []
    _match(value, z, leaves)
    if not checked:
        return leaves
    return [_checked(leaf, like) if is_moved(like) else leaf for leaf, like in zip(leaves, _tensors(z), strict=True)]


def _tensors(tree: Tree) -> list[Tensor]:
    tensors: list[Tensor] = []
    describe(tree, tensors, named=True)
    return tensors


def _match(value: Any, z: Any, leaves: list[Tensor]) -> None:
    if isinstance(z, Tensor):
        if is_moved(z) and not isinstance(value, Tensor):
            _refuse(value, f"a tensor of the shape {tuple(z.shape)}")
        leaves.append(value if is_moved(z) else z.clone())  # a graph must not return its inputs
    elif isinstance(z, dict):
        if not isinstance(value, dict) or len(value) != len(z) or any(key not in value for key in z):
            _refuse(value, f"a dict with the keys {list(z)}")
        for key in z:
            _match(value[key], z[key], leaves)
    elif isinstance(z, list | tuple):
        same = is_named(z) == is_named(value) and isinstance(value, list if isinstance(z, list) else tuple)
        if not same or len(value) != len(z):
            _refuse(value, f"a {type(z).__name__} of {len(z)}")
        for part, like in zip(value, z, strict=True):
            _match(part, like, leaves)


def _checked(value: Tensor, z: Tensor) -> Tensor:
    if value.dim() != z.dim() or any(a != b for a, b in zip(value.shape, z.shape, strict=True)):
        raise ProblemError(f"f must keep the shape of z, which is {tuple(z.shape)} (got {tuple(value.shape)}).")
    if value.dtype == z.dtype:
        return value
    if value.is_floating_point() and z.is_floating_point() and torch.is_autocast_enabled(z.device.type):
        return value.to(z.dtype)
    raise ProblemError(
        f"f must keep the dtype of z, {z.dtype} (got {value.dtype}). Cast z0, or the parameters and inputs of f."
    )


def _refuse(value: Any, expected: str) -> None:
    raise ProblemError(f"f(z, ...) must return a tree like z (got {described(value)} instead of {expected}).")


def joined(leaves: list[Tensor], batch: bool) -> Tensor:
    """Return the moved leaves as a matrix `(batch, n)`; two numbers for each complex one."""
    moved = [leaf for leaf in leaves if is_moved(leaf)]
    leaves = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in moved]
    parts = [
        (leaf.flatten(1) if leaf.dim() > 1 else leaf[:, None]) if batch else leaf.reshape(1, -1) for leaf in leaves
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def split(matrix: Tensor, like: Tree, batch: bool) -> Any:
    """Return the tree like `like` whose moved leaves are in the matrix."""
    begin = 0

    def part(leaf: Tensor) -> Tensor:
        nonlocal begin
        if not is_moved(leaf):
            return leaf
        shape = (matrix.shape[0], *leaf.shape[1:]) if batch else tuple(leaf.shape)
        size = 2 if leaf.is_complex() else 1
        for extent in leaf.shape[1:] if batch else leaf.shape:
            size = size * extent
        columns = matrix[:, begin : begin + size]
        begin = begin + size
        if not leaf.is_complex():
            return columns.reshape(shape)
        pairs = columns.reshape(*shape, 2)
        return torch.complex(pairs[..., 0], pairs[..., 1])

    return mapped(part, like)
