"""The items of a stream: the initial iterate and the arguments of one sample, without a batch axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deqcore.abc.arrays import is_inexact
from deqcore.abc.backend import Backend
from deqcore.errors import InitialIterateError, ProblemError
from deqcore.solve.leaves import REAL
from deqcore.types import Array, Tree

NUMBERS = bool | int | float | np.ndarray | np.generic


@dataclass(frozen=True)
class Sample:
    """One item: its number, and its arrays.

    Attributes:
        index: the number of the item in the stream.
        z0: leaves of the initial iterate; a complex leaf as pairs of real numbers.
        args: leaves of the arguments that are arrays or numbers.
    """

    index: int
    z0: tuple[Array, ...]
    args: tuple[Array, ...]


@dataclass(frozen=True)
class Layout:
    """What the first item looks like, which all others must.

    Attributes:
        backend: of the arrays.
        z_structure: of z0.
        structure: of the arguments.
        like: the first leaf of the first z0.
        z_kinds: dtype and shape of each leaf of z0.
        kinds: dtype and shape of each leaf of the arguments, or the leaf itself if it is not an array.
    """

    backend: Backend
    z_structure: Any
    structure: Any
    like: Array
    z_kinds: tuple[Any, ...]
    kinds: tuple[Any, ...]

    @classmethod
    def of(cls, backend: Backend, z0: Tree, args: tuple[Any, ...]) -> Layout:
        """Describe the first item.

        Raises:
            InitialIterateError: a leaf of z0 is not a floating-point or complex array of at least one axis.
        """
        (z_leaves, z_structure), (leaves, structure) = backend.flatten(z0), backend.flatten(args)
        for leaf in z_leaves:
            _check_iterate(backend, leaf)
        if not z_leaves:
            raise InitialIterateError(
                "Item 0 of the stream: z0 must hold at least one array of floating-point or complex numbers (got none)."
            )
        like = z_leaves[0]
        kinds = tuple(_kind(backend, leaf, like) for leaf in leaves)
        return cls(backend, z_structure, structure, like, tuple(_kind(backend, x, like) for x in z_leaves), kinds)

    def sample(self, z0: Tree, args: tuple[Any, ...], index: int) -> Sample:
        """Return an item as arrays.

        Raises:
            ProblemError: it is not like the first item.
        """
        (z_leaves, z_structure), (leaves, structure) = self.backend.flatten(z0), self.backend.flatten(args)
        for what, made, expected in (("z0", z_structure, self.z_structure), ("args", structure, self.structure)):
            if made != expected:
                raise ProblemError(
                    f"Item {index} of the stream: {what} must have the structure of item 0, {expected} (got {made})."
                )
        self._compare("z0", z_leaves, self.z_kinds, index)
        self._compare("args", leaves, self.kinds, index)
        return Sample(
            index,
            tuple(self._real(leaf, kind) for leaf, (kind, _) in zip(z_leaves, self.z_kinds, strict=True)),
            tuple(_array(self.backend, leaf, self.like) for leaf in leaves if _is_numeric(self.backend, leaf)),
        )

    def _real(self, leaf: Any, kind: str) -> Array:
        """Return a leaf of z0 as an array, a complex one as pairs."""
        array = _array(self.backend, leaf, self.like)
        return self.backend.numbers.to_pairs(array) if kind in REAL else array

    def _compare(self, what: str, leaves: list[Any], kinds: tuple[Any, ...], index: int) -> None:
        for place, (leaf, expected) in enumerate(zip(leaves, kinds, strict=True)):
            kind = _kind(self.backend, leaf, self.like)
            if kind is not expected and not bool(kind == expected):
                raise ProblemError(
                    f"Item {index} of the stream: leaf {place} of {what} must be like that of item 0, "
                    f"{_text(expected)} (got {_text(kind)}). All items share one batch: pad or cast them, or "
                    f"solve each kind in a stream of its own."
                )

    def batch(self, sample: Sample, size: int) -> tuple[Tree, tuple[Any, ...]]:
        """Return z0 and the arguments of `size` copies of a sample."""
        xp = self.backend.xp
        stacked = [xp.stack([leaf] * size) for leaf in sample.z0]
        pairs = zip(stacked, self.z_kinds, strict=True)
        z0 = self.iterate([self.backend.numbers.from_pairs(z) if kind in REAL else z for z, (kind, _) in pairs])
        return z0, self.arguments(tuple(xp.stack([leaf] * size) for leaf in sample.args))

    def leaves(self, args: tuple[Any, ...]) -> tuple[Array, ...]:
        """Return the stacked arrays of arguments."""
        return tuple(leaf for leaf in self.backend.flatten(args)[0] if self.backend.is_array(leaf))

    def arguments(self, arrays: tuple[Array, ...]) -> tuple[Any, ...]:
        """Return the arguments of f with these arrays as leaves."""
        given = iter(arrays)
        made = [next(given) if isinstance(kind, tuple) else kind for kind in self.kinds]
        args: tuple[Any, ...] = self.backend.unflatten(self.structure, made)
        return args

    def iterate(self, leaves: Sequence[Array]) -> Tree:
        """Return an iterate of these leaves."""
        return self.backend.unflatten(self.z_structure, leaves)


@dataclass(frozen=True)
class Unravel:
    """Split rows into the leaves of iterates, for `Autodiff.staged`: a tracing backend compiles it.

    Attributes:
        backend: of the arrays.
        kinds: dtype and shape of each leaf of one sample.
    """

    backend: Backend
    kinds: tuple[tuple[str, tuple[int, ...]], ...]

    def __call__(self, bind: Any, rows: Array) -> tuple[tuple[Array, ...], ...]:
        """Return the leaves of each row of `rows` `(k, n)`."""
        xp, parts, start = self.backend.xp, [], 0
        for kind, own in self.kinds:
            shape = (*own, 2) if kind in REAL else own
            size = math.prod(shape)
            leaves = xp.reshape(rows[:, start : start + size], (-1, *shape))
            parts.append(self.backend.numbers.from_pairs(leaves) if kind in REAL else leaves)
            start += size
        return tuple(tuple(part[k] for part in parts) for k in range(rows.shape[0]))


def _check_iterate(backend: Backend, leaf: Any) -> None:
    """Refuse a leaf of the first z0 that cannot be stacked to a state."""
    if not backend.is_array(leaf) or not is_inexact(backend.dtype_name(leaf)) or leaf.ndim < 1:
        kind = f"{backend.dtype_name(leaf)} {tuple(leaf.shape)}" if backend.is_array(leaf) else type(leaf).__name__
        raise InitialIterateError(
            f"Item 0 of the stream: each leaf of z0 must be an array of {backend.name} of floating-point or complex "
            f"numbers with at least one axis, without a batch axis (got {kind}). Pass integers as arguments, and a "
            f"number as an array of shape (1,)."
        )


def _is_numeric(backend: Backend, leaf: Any) -> bool:
    return backend.is_array(leaf) or isinstance(leaf, NUMBERS)


def _array(backend: Backend, leaf: Any, like: Array) -> Array:
    """Return a leaf as an array on the device of `like`; Python's floats take its dtype."""
    if backend.is_array(leaf):
        return leaf
    if type(leaf) is float:
        return backend.asarray(np.asarray(leaf), like=like)  # by way of float64: torch makes float32 of a number
    return backend.asarray(leaf, dtype=backend.dtype_name(backend.asarray(leaf)), like=like)


def _kind(backend: Backend, leaf: Any, like: Array) -> Any:
    """Return dtype and shape of an array or a number, anything else as it is."""
    if not _is_numeric(backend, leaf):
        return leaf
    array = _array(backend, leaf, like)
    return backend.dtype_name(array), tuple(array.shape)


def _text(kind: Any) -> str:
    return f"{kind[0]} {kind[1]}" if isinstance(kind, tuple) else repr(kind)
