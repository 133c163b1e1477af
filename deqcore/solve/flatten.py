"""The boundary between the user's state, any tree of arrays, and the core's matrix `(batch, n)`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from deqcore.abc.backend import Backend
from deqcore.errors import ConfigError, InitialIterateError, ProblemError, described
from deqcore.solve.leaves import (
    REAL,
    Carried,
    check_leaf,
    check_rows,
    check_sizes,
    complex_call,
    dtype_of,
    floating,
    is_carried,
    moved,
)
from deqcore.solve.opaque import arrays_in
from deqcore.types import Array, Map, Tree


@dataclass(frozen=True)
class RavelSpec:
    """The layout by which a tree of arrays becomes a matrix and back.

    Attributes:
        shapes: shape of each leaf.
        sizes: count of real numbers per row in each leaf: two for a complex number.
        batch: rows of the matrix, which are samples or units; 1 if the whole state is one system.
        dtype: of the matrix, a real dtype.
        complex: the dtype of each complex leaf and "" for others; empty if no leaf is complex. Solvers and strategies
            see each complex number as two real ones, so f need not be holomorphic.
        carried: leaves of integers, booleans and anything else that is not an array, by position: f gets them as they
            are in z0, and no solver changes them. The fields above describe the others.
        axes: leading axes of each leaf that number the rows: 0, 1 or 2.
        bare: the tree is one real array, as in most calls.
    """

    backend: Backend
    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    batch: int
    dtype: str
    device: Any
    complex: tuple[str, ...] = ()
    carried: Carried = field(default=(), compare=False)
    axes: int = 1
    bare: bool = False

    @classmethod
    def of(cls, backend: Backend, z0: Tree, batch: bool | Literal[2]) -> RavelSpec:
        """Describe the initial iterate z0, or raise an error that says what is wrong with it.

        Args:
            backend: of the arrays.
            z0: the tree.
            batch: as the setting `forward.batch`.

        Raises:
            InitialIterateError: no arrays, integers, mixed precisions, several devices, too few axes, unequal batches,
                symbolic sizes.
        """
        every, structure = backend.flatten(z0)
        kinds = [backend.dtype_name(leaf) if backend.is_array(leaf) else "" for leaf in every]
        plain = all("float" in kind for kind in kinds)  # as in most calls
        carried = () if plain else tuple((i, leaf) for i, leaf in enumerate(every) if is_carried(backend, leaf))
        leaves = moved(every, carried) if batch else floating(backend, every, carried)
        if not every:
            raise InitialIterateError(
                "The initial iterate z0 must hold at least one array of floating-point numbers (got none)."
            )
        leaves = leaves or every  # the error names what is there
        axes = int(batch)
        for leaf in leaves:
            check_leaf(backend, leaf, axes)
        kinds = kinds if plain else [backend.dtype_name(leaf) for leaf in leaves]
        pairs = () if plain else tuple(kind if kind in REAL else "" for kind in kinds)
        pairs = pairs if any(pairs) else ()
        dtype = dtype_of(set(kinds))
        devices = {str(at) for leaf in leaves if (at := backend.device_of(leaf)) is not None}
        if len(devices) > 1:
            raise InitialIterateError(
                f"The leaves of the state must be on one device (got {', '.join(sorted(devices))}). Move them to one "
                f"device before the solve."
            )
        shapes = tuple(tuple(leaf.shape) for leaf in leaves)
        check_rows(shapes, axes)
        check_sizes(shapes, axes)
        sizes = tuple(math.prod(shape[axes:]) * (2 if pairs and pairs[i] else 1) for i, shape in enumerate(shapes))
        device = backend.device_of(leaves[0])
        rows = math.prod(shapes[0][:axes])
        bare = every[0] is z0 and not pairs and not carried
        return cls(backend, structure, shapes, sizes, rows, dtype, device, pairs, carried, axes, bare)

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """The shape of what is reported for each row: `(batch,)`, or `(batch, units)`; `(1,)` for one system."""
        return self.shapes[0][: self.axes] or (1,)

    @property
    def units(self) -> int:
        """Consecutive rows that belong to one sample."""
        return max(1, self.shapes[0][1]) if self.axes == 2 else 1

    def leaves(self, tree: Tree) -> list[Array]:
        """Return the leaves of a tree like the state that the solver moves."""
        return floating(self.backend, self.backend.flatten(tree)[0], self.carried)

    def ravel(self, tree: Tree) -> Array:
        """Return the matrix `(batch, n)` of a tree that is known to fit."""
        return self._join(self.leaves(tree))

    def ravel_like(self, name: str, tree: Tree) -> Array:
        """Return the matrix `(batch, n)` of a tree that must be like the state.

        Raises:
            InitialIterateError: it has another structure, or leaves of another kind, shape or dtype.
        """
        every, structure = self.backend.flatten(tree)
        leaves = floating(self.backend, every, self.carried) if structure == self.structure else every
        kinds = [self._kind(leaf) for leaf in leaves]
        expected = [f"{self._dtype(i)} {shape}" for i, shape in enumerate(self.shapes)]
        if structure != self.structure or kinds != expected:
            raise InitialIterateError(
                f"The {name} must be a tree like z0, with the leaves {', '.join(expected)} "
                f"(got {', '.join(kinds) or 'none'})."
            )
        return self._join(leaves)

    def ravel_cotangent(self, tree: Tree) -> Array:
        """Return the matrix `(batch, n)` of a cotangent, which follows the framework's convention for complex numbers.

        Raises:
            InitialIterateError: as `ravel_like`.
        """
        if self.complex and self.backend.autodiff.conjugates:
            leaves, structure = self.backend.flatten(tree)
            kinds = [self.backend.dtype_name(leaf) if self.backend.is_array(leaf) else "" for leaf in leaves]
            turned = [self.backend.xp.conj(a) if kind in REAL else a for a, kind in zip(leaves, kinds, strict=True)]
            tree = self.backend.unflatten(structure, turned)
        return self.ravel_like("cotangent", tree)

    def _dtype(self, i: int) -> str:
        return (self.complex and self.complex[i]) or self.dtype

    def _is_complex(self, i: int) -> bool:
        return bool(self.complex and self.complex[i])

    def _kind(self, leaf: Any) -> str:
        if not self.backend.is_array(leaf):
            return type(leaf).__name__
        return f"{self.backend.dtype_name(leaf)} {tuple(leaf.shape)}"

    def unravel(self, matrix: Array) -> Tree:
        """Return the tree of a matrix `(batch, n)`."""
        xp = self.backend.xp
        if self.bare:
            shape = self.shapes[0]
            return matrix if matrix.shape == shape else xp.reshape(matrix, shape)
        leaves, start = [], 0
        for i, (shape, size) in enumerate(zip(self.shapes, self.sizes, strict=True)):
            part = matrix if len(self.sizes) == 1 else matrix[:, start : start + size]
            if self._is_complex(i):
                part = self.backend.numbers.from_pairs(xp.reshape(part, (*shape, 2)))
            leaves.append(part if part.shape == shape else xp.reshape(part, shape))
            start += size
        for position, leaf in self.carried:
            leaves.insert(position, leaf)
        return self.backend.unflatten(self.structure, leaves)

    def wrap(self, f: Callable[..., Tree], batched: tuple[int, ...] = ()) -> FlatFunction:
        """Wrap f on trees as a function of the matrix that checks its output. See `FlatFunction`."""
        return FlatFunction(self, f, batched)

    def call(self, f: Callable[..., Tree], z: Array, args: tuple[Any, ...]) -> Array:
        """Return `f` of the matrix `z`, as a matrix."""
        with self.backend.guards.guard_inplace(z) as guarded:
            tree = self.unravel(guarded)
            value = complex_call(f, tree, args, self._kinds()) if self.complex else f(tree, *args)
        if self.bare and self._fits(value, z):
            owned, shape = self.backend.guards.owned([value])[0], (self.batch, self.sizes[0])
            return owned if owned.shape == shape else self.backend.xp.reshape(owned, shape)
        leaves, structure = self.backend.flatten(value)
        if structure != self.structure:
            raise ProblemError(
                f"f(z, ...) must return a tree like z, of the structure {self.structure} (got {described(value)} of "
                f"the structure {structure})."
            )
        leaves = moved(leaves, self.carried)
        if len(leaves) == 1:  # several leaves are joined in a new array
            leaves = self.backend.guards.owned(leaves)
        return self._join([self._checked(leaf, i) for i, leaf in enumerate(leaves)])

    def _fits(self, value: Any, z: Array) -> bool:
        """Return whether f(z) passes every check below for a bare array, by comparisons with the matrix z."""
        return (
            type(value) is type(z)
            and value.dtype == z.dtype
            and value.shape == self.shapes[0]
            and self.backend.device_of(value) == self.device
        )

    def _kinds(self) -> str:
        return ", ".join(dict.fromkeys(self._dtype(i) for i in range(len(self.shapes))))

    def of_rows(self, rows: int) -> RavelSpec:
        """Return the same space with another number of samples."""
        return replace(self, shapes=tuple((rows, *shape[1:]) for shape in self.shapes), batch=rows)

    def _join(self, leaves: list[Array]) -> Array:
        xp = self.backend.xp
        rows = self.batch
        if self.complex:
            leaves = [self.backend.numbers.to_pairs(a) if self.complex[i] else a for i, a in enumerate(leaves)]
        parts = [
            a if a.shape == (rows, size) else xp.reshape(a, (rows, size))
            for a, size in zip(leaves, self.sizes, strict=True)
        ]
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=1)

    def _checked(self, leaf: Any, i: int) -> Array:
        backend = self.backend
        if not backend.is_array(leaf):
            raise ProblemError(
                f"f must return arrays of {backend.name} (got a {type(leaf).__name__} as leaf {i}). Convert it in f."
            )
        if (reason := backend.guards.unfit(leaf)) is not None:
            raise ProblemError(f"f must not return {reason}.")
        if tuple(leaf.shape) != self.shapes[i]:
            raise ProblemError(
                f"f must keep the shape of z, which is {self.shapes[i]} in leaf {i} (got {tuple(leaf.shape)})."
            )
        kind, expected = backend.dtype_name(leaf), self._dtype(i)
        wide = backend.guards.in_extended_precision()
        if kind != expected and not (wide and ("complex" in kind or not self._is_complex(i))):
            if backend.guards.autocasting(leaf):
                return backend.astype(leaf, expected)
            raise ProblemError(
                f"f must keep the dtype of z, {expected} (got {kind}). Cast z0, or the parameters and inputs of f."
                + (" A complex state needs a complex value: f must not drop the imaginary part." * self._is_complex(i))
            )
        device = backend.device_of(leaf)
        differs = device is not None and self.device is not None and device != self.device
        if differs and str(device) != str(self.device):
            raise ProblemError(
                f"f must return arrays on the device of z, {self.device} (got {device}). Move z0, or the parameters "
                f"and inputs of f, so that all are on one device."
            )
        return leaf


@dataclass(frozen=True)
class FlatFunction:
    """The user's f on matrices `(batch, n)`.

    Attributes:
        space: how the state becomes a matrix.
        f: `f(z, *args)` on trees.
        batched: positions in `args` of those that carry the batch axis; only `on_rows` reads them.
    """

    space: RavelSpec
    f: Callable[..., Tree]
    batched: tuple[int, ...] = ()

    def __call__(self, z: Array, *args: Any) -> Array:
        """Return f of `z` `(batch, n)`.

        Raises:
            ProblemError: f returned another structure, shape, dtype or device.
        """
        return self.space.call(self.f, z, args)

    def on_rows(self, rows: Array, args: tuple[Any, ...]) -> Map:
        """Return f for the samples `rows` (indices `(k,)`) only: `(k, n)` to `(k, n)`."""
        backend = self.space.backend
        space = self.space.of_rows(rows.shape[0])

        def taken(leaf: Any) -> Any:
            return backend.take(leaf, rows) if backend.is_array(leaf) else leaf

        some = list(args)
        for i in self.batched:
            leaves, structure = backend.flatten(args[i])
            some[i] = backend.unflatten(structure, [taken(leaf) for leaf in leaves])
        return lambda z: space.call(self.f, z, tuple(some))

    def check_batched(self, args: tuple[Any, ...]) -> None:
        """Check that the arguments named in `batched` carry the batch axis.

        Raises:
            ConfigError: a position does not name an argument, or an array there has another first axis.
        """
        for i in self.batched:
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(args):
                raise ConfigError.bad_value(
                    "fixed_point", "batched_args", self.batched, f"positions among the {len(args)} arguments after z0"
                )
            for leaf in self.space.backend.flatten(args[i])[0]:
                self._refuse_opaque(i, leaf)
                shape = getattr(leaf, "shape", None)
                if shape is not None and tuple(shape[:1]) != (self.space.batch,):
                    raise ConfigError(
                        f"fixed_point: batched_args = {self.batched!r} names argument {i}, so the first axis of each "
                        f"array in it must be the batch of {self.space.batch} (got the shape {tuple(shape)}). Leave "
                        f"the argument out, or give every array in it that first axis."
                    )

    def _refuse_opaque(self, i: int, leaf: Any) -> None:
        """Refuse a leaf that holds arrays, because their rows cannot be taken."""
        backend = self.space.backend
        if not backend.is_array(leaf) and any(True for _ in arrays_in(backend, leaf)):
            raise ConfigError(
                f"fixed_point: batched_args = {self.batched!r} names argument {i}, but its arrays are inside a "
                f"{type(leaf).__name__} and not leaves of a tree. Pass them as a dict or a tuple, or register the "
                f"class as a pytree."
            )
