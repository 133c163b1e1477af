"""Equilibria by sample id in JAX: a value that goes into a step and comes out of it.

The arrays have a fixed capacity, so that a step under `jit` is compiled once.

Example:
    >>> import jax, jax.numpy as jnp, deqcore
    >>> from deqcore_jax.equilibrium_cache import EquilibriumCache
    >>> @jax.jit
    ... def step(x, ids, cache):
    ...     sol = deqcore.fixed_point(lambda z, x: 0.5 * jnp.cos(z) + x, cache.start(ids, 0 * x), x)
    ...     return sol.value, cache.store(ids, sol), sol.steps
    >>> cache, ids = EquilibriumCache.empty(jnp.zeros((2, 3)), capacity=100), jnp.array([7, 4])
    >>> for epoch in range(2):
    ...     z, cache, steps = step(jnp.ones((2, 3)), ids, cache)
    >>> steps.tolist(), cache.statistics()["hits"].tolist()
    ([0, 0], 2)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from deqcore.errors import ConfigError, InitialIterateError
from deqcore.solution import Solution
from deqcore.types import Tree
from deqcore.warm_start import check_batch, check_ids, restart_changed

OWNER: Final = "EquilibriumCache"
COUNTS: Final = ("hits", "misses", "rejected", "evictions")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "last_used", "clock", "values", "counts"],
    meta_fields=["unconverged"],
)
@dataclass(frozen=True)
class EquilibriumCache:
    """Equilibria by sample id, of samples of one shape. A pytree; `store` returns the next one.

    Stored states carry no gradient, and the start of a solve changes only how many steps it takes. When the cache is
    full, the states that were not used for the longest time make room (LRU), in any order within a batch. Looking up a
    batch compares each of its ids with each stored one.

    Ids are integers that fit int32, one for each sample of a batch. A negative id means that a sample has no memory: it
    starts at z0 and is not stored. If an id occurs twice in a batch, the last sample with it is stored.

    Make one with `empty`.

    Attributes:
        ids: the id in each slot, −1 in a free one, `(capacity,)` int32.
        last_used: when each slot was used last, −1 for never, `(capacity,)` int32.
        clock: how many batches were stored, int32.
        values: the leaves of the stored states that a solver moves, `(capacity, …)` each.
        counts: hits, misses, rejected samples and evictions, `(4,)` int32.
        unconverged: whether samples that did not converge are stored, too; not an array.

    Example:
        >>> cache = EquilibriumCache.empty({"z": jnp.zeros((8, 3))}, capacity=100, dtype="float16")
        >>> cache.capacity, cache.values[0].shape
        (100, (100, 3))
    """

    ids: jax.Array
    last_used: jax.Array
    clock: jax.Array
    values: list[jax.Array]
    counts: jax.Array
    unconverged: bool = field(default=False)

    @classmethod
    def empty(cls, z0: Tree, capacity: int, *, dtype: str | None = None, unconverged: bool = False) -> EquilibriumCache:
        """Return a cache without states.

        Args:
            z0: an initial iterate of a batch, arrays or `jax.ShapeDtypeStruct`s: it gives the shapes of a sample.
            capacity: the most states that are kept, at least the batch.
            dtype: of stored numbers, such as "bfloat16"; complex ones are stored as they are. None: as the state.
            unconverged: also store samples that did not converge. Samples that are not finite are never stored.

        Raises:
            ConfigError: the capacity is not a positive integer, or the dtype is not one of floating-point numbers.
        """
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ConfigError.bad_value(OWNER, "capacity", capacity, "an integer >= 1")
        if dtype is not None and dtype not in ("float16", "bfloat16", "float32", "float64"):
            raise ConfigError.bad_value(OWNER, "dtype", dtype, "None, float16, bfloat16, float32 or float64")
        values = [
            jnp.zeros((capacity, *leaf.shape[1:]), leaf.dtype if _complex(leaf) else dtype or leaf.dtype)
            for leaf in _moving(z0)
        ]
        free = jnp.full(capacity, -1, jnp.int32)
        return cls(free, free, jnp.zeros((), jnp.int32), values, jnp.zeros(4, jnp.int32), unconverged)

    @property
    def capacity(self) -> int:
        """The most states that are kept."""
        return self.ids.shape[0]

    def start(self, ids: ArrayLike, z0: Tree, changed: ArrayLike | None = None) -> Tree:
        """Return the initial iterate of a batch: stored states, and z0 for samples without one.

        Args:
            ids: the sample ids, integers `(batch,)`.
            z0: where other samples start, a tree whose leaves have the batch as their first axis.
            changed: parts of the state that begin at z0 in any case, see `deqcore.warm_start.restart_changed`.

        Returns:
            A tree like z0.

        Raises:
            ConfigError: the ids are not integers `(batch,)`, or the batch is larger than the cache.
            InitialIterateError: a sample has other shapes than those of the cache.
        """
        numbers = self._checked(ids, z0)
        hit, slot = self._find(numbers)
        leaves, structure = jax.tree.flatten(z0)
        stored = iter(self.values)
        starts = [_chosen(hit, next(stored)[slot], leaf) if _moves(leaf) else leaf for leaf in leaves]
        start = jax.tree.unflatten(structure, starts)
        return start if changed is None else restart_changed(start, z0, changed)

    def store(self, ids: ArrayLike, solution: Solution) -> EquilibriumCache:
        """Return the cache with the equilibria of a batch.

        Samples that have not converged (with `batch = 2`, of which a unit has not) or that are not finite in the dtype
        of the cache are not stored; what is stored for their ids stays.

        Args:
            ids: the sample ids, integers `(batch,)`, the same as for `start`.
            solution: of the solve.

        Raises:
            ConfigError: the ids are not integers `(batch,)`, or the batch is larger than the cache.
            InitialIterateError: a sample has other shapes than those of the cache.
        """
        numbers = self._checked(ids, solution.value)
        batch, known = len(numbers), numbers >= 0
        rows = [
            lax.stop_gradient(leaf).astype(value.dtype)
            for leaf, value in zip(_moving(solution.value), self.values, strict=True)
        ]
        good = _finite(rows, batch) & (self.unconverged | _converged(solution, batch))
        same = jnp.triu(numbers[:, None] == numbers[None, :], 1) & good[None, :]
        keep = known & good & ~same.any(1)
        hit, slot = self._find(numbers)
        now = self.clock + 1
        used = self.last_used.at[jnp.where(hit, slot, self.capacity)].set(now, mode="drop")
        new = keep & ~hit
        if batch:
            oldest = lax.top_k(-used, batch)[1].astype(jnp.int32)
            slot = jnp.where(hit, slot, oldest[jnp.maximum(jnp.cumsum(new) - 1, 0)])
        evicted = new & (self.ids[slot] >= 0)
        target = jnp.where(keep, slot, self.capacity)  # beyond the end: not written
        events = (known & hit, known & ~hit, known & ~good, evicted)
        return replace(
            self,
            ids=self.ids.at[target].set(numbers, mode="drop"),
            last_used=used.at[target].set(now, mode="drop"),
            clock=now,
            values=[value.at[target].set(row, mode="drop") for value, row in zip(self.values, rows, strict=True)],
            counts=self.counts + jnp.stack([event.sum(dtype=jnp.int32) for event in events]),
        )

    def forget(self, ids: ArrayLike | None = None) -> EquilibriumCache:
        """Return the cache without the states of these ids.

        Args:
            ids: integers `(count,)`; None: all.

        Raises:
            ConfigError: the ids are not integers `(count,)`.
        """
        gone = jnp.ones(self.capacity, bool) if ids is None else (self.ids[:, None] == _numbers(ids)[None, :]).any(1)
        return replace(self, ids=jnp.where(gone, -1, self.ids), last_used=jnp.where(gone, -1, self.last_used))

    def resized(self, capacity: int) -> EquilibriumCache:
        """Return the cache with another capacity, as after loading a checkpoint. The most recently used states stay.

        Args:
            capacity: the most states that are kept.

        Raises:
            ConfigError: it is not a positive integer.
        """
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ConfigError.bad_value(OWNER, "capacity", capacity, "an integer >= 1")
        latest = jnp.argsort(-self.last_used)[:capacity]
        more = capacity - len(latest)

        def moved(x: jax.Array, fill: int) -> jax.Array:
            return jnp.pad(x[latest], [(0, more)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)

        return replace(
            self,
            ids=moved(self.ids, -1),
            last_used=moved(self.last_used, -1),
            values=[moved(value, 0) for value in self.values],
        )

    def statistics(self) -> dict[str, jax.Array]:
        """Return scalars: hits, misses, rejected and evictions since the cache was made, and the entries now."""
        return dict(zip(COUNTS, self.counts, strict=True)) | {"entries": (self.ids >= 0).sum()}

    def _find(self, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return which ids are stored, and their slots (any slot for others), `(batch,)` each."""
        match = (numbers[:, None] == self.ids[None, :]) & (numbers >= 0)[:, None]
        return match.any(1), match.argmax(1).astype(jnp.int32)

    def _checked(self, ids: ArrayLike, tree: Tree) -> jax.Array:
        """Return the ids as int32, if they and the state fit."""
        numbers, leaves = _numbers(ids), _moving(tree)
        for leaf in leaves:
            check_batch(OWNER, len(numbers), leaf.shape)
        given, expected = [leaf.shape[1:] for leaf in leaves], [value.shape[1:] for value in self.values]
        if given != expected or any(_complex(a) != _complex(b) for a, b in zip(leaves, self.values, strict=True)):
            raise InitialIterateError(
                f"{OWNER}: a sample must have leaves of the shapes {expected}, for which the cache was made (got "
                f"{given}). Make one cache for each shape, by EquilibriumCache.empty."
            )
        if len(numbers) > self.capacity:
            raise ConfigError.bad_value(OWNER, "capacity", self.capacity, f"at least the batch of {len(numbers)}")
        return numbers


def _numbers(ids: ArrayLike) -> jax.Array:
    """Return sample ids as int32.

    Raises:
        ConfigError: they are not integers `(batch,)`, or known to exceed int32.
    """
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids, np.int64) if isinstance(ids, list | tuple) and not ids else np.asarray(ids)
    check_ids(OWNER, str(ids.dtype), ids.shape)
    if isinstance(ids, np.ndarray) and ids.size and ids.max() > np.iinfo(np.int32).max:
        raise ConfigError.bad_value(OWNER, "ids", int(ids.max()), "at most 2147483647, so that they fit int32")
    return jnp.asarray(np.maximum(ids, -1) if isinstance(ids, np.ndarray) else jnp.maximum(ids, -1), jnp.int32)


def _moves(leaf: object) -> bool:
    """Return whether a solver changes this leaf of a state; others are those of the initial iterate."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _moving(tree: Tree) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(tree) if _moves(leaf)]


def _complex(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def _chosen(hit: jax.Array, stored: jax.Array, leaf: jax.Array) -> jax.Array:
    """Return stored rows where `hit`, those of z0 elsewhere."""
    stored = lax.stop_gradient(stored).astype(leaf.dtype)
    return jnp.where(hit.reshape(-1, *(1,) * (leaf.ndim - 1)), stored, leaf)


def _finite(rows: list[jax.Array], batch: int) -> jax.Array:
    finite = jnp.ones(batch, bool)
    for row in rows:
        finite &= jnp.isfinite(row).all(axis=tuple(range(1, row.ndim)))
    return finite


def _converged(solution: Solution, batch: int) -> jax.Array:
    """Return which samples have converged in all units that took part, `(batch,)`."""
    converged = solution.converged if solution.mask is None else solution.converged | ~solution.mask
    if converged.shape[:1] != (batch,):
        check_batch(OWNER, batch, ())
    return converged if converged.ndim == 1 else converged.all(axis=1)
