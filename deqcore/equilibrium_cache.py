"""`EquilibriumCache`: equilibria by sample id. In JAX the cache is a value, see `deqcore_jax.equilibrium_cache`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.errors import BackendError, ConfigError
from deqcore.solution import Solution
from deqcore.types import Array, Tree
from deqcore.warm_start import backend_of, check_batch, check_ids, is_stored, restart_changed

OWNER: Final = "EquilibriumCache"
DTYPES: Final = ("float16", "bfloat16", "float32", "float64")

Layout = tuple[tuple[bool, tuple[int, ...]], ...]  # whether each leaf is complex, and its shape for one sample


class CacheStatistics(NamedTuple):
    """The counts of an `EquilibriumCache` since it was made, and its size now.

    Attributes:
        hits: samples that started from their stored state.
        misses: samples that started at z0, because nothing was stored for their id.
        mismatches: samples that started at z0, because their stored state has another shape.
        rejected: samples that were not stored, because they had not converged or were not finite.
        evictions: states that were dropped to make room.
        entries: states stored now.
        bytes: their size.

    Example:
        >>> CacheStatistics(hits=3, misses=1, mismatches=0, rejected=0, evictions=0, entries=4, bytes=64).hit_rate
        0.75
    """

    hits: int
    misses: int
    mismatches: int
    rejected: int
    evictions: int
    entries: int
    bytes: int

    @property
    def hit_rate(self) -> float:
        """The share of samples that started from their stored state, 0 before the first."""
        return self.hits / max(1, self.hits + self.misses + self.mismatches)


class _Entry(NamedTuple):
    layout: Layout
    rows: tuple[Array, ...]  # one array for each leaf that a solver moves, (1, *shape)
    bytes: int


class EquilibriumCache:
    """Equilibria by sample id, so that the next solve of a sample starts where the last one ended.

    Stored states carry no gradient, and the start of a solve changes only how many steps it takes. When the cache is
    full, the states that were not used for the longest time make room (LRU). Not for concurrent threads.

    Ids are integers, one for each sample of a batch, such as positions in a data set. A negative id means that a sample
    has no memory: it starts at z0 and is not stored. Of an id that occurs twice in a batch, the last sample is stored.
    Reading ids from another device waits for it, so keep them on the host.

    Args:
        capacity: the most states that are kept; None: only `max_bytes` counts.
        max_bytes: the most bytes that they take; None: only `capacity` counts.
        dtype: of stored numbers: "float16", "bfloat16", "float32" or "float64" (NumPy has no bfloat16). Complex numbers
            are stored as they are. None: as the state.
        device: where states are kept, such as "cpu"; None: on the device of the state.
        unconverged: also store samples that did not converge. Samples that are not finite are never stored.
        compare: a layer starts each sample at z0 if its residual is smaller there than at the stored state, see
            `deqcore.warm_start.closer_start`; two evaluations of f more for each solve.
        persistent: the `state_dict` of a layer of PyTorch contains the states.

    Raises:
        ConfigError: an option is out of range, or neither `capacity` nor `max_bytes` is given.

    Example:
        >>> import numpy as np, deqcore
        >>> from deqcore.equilibrium_cache import EquilibriumCache
        >>> f, cache = (lambda z, x: 0.5 * np.cos(z) + x), EquilibriumCache(1000)
        >>> for epoch in range(2):
        ...     for ids in ([0, 1], [2, 3]):
        ...         x = np.array(ids)[:, None] / 4
        ...         sol = deqcore.fixed_point(f, cache.start(ids, 0 * x), x)
        ...         cache.store(ids, sol)
        >>> cache.statistics.hits, cache.statistics.misses, sol.steps.tolist()
        (4, 4, [0, 0])
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        max_bytes: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        unconverged: bool = False,
        compare: bool = False,
        persistent: bool = False,
    ) -> None:
        for name, value in (("capacity", capacity), ("max_bytes", max_bytes)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError.bad_value(OWNER, name, value, "an integer >= 1, or None")
        if capacity is None and max_bytes is None:
            raise ConfigError(f"{OWNER}: capacity or max_bytes must be given, because the cache must be bounded.")
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError.bad_value(OWNER, "dtype", dtype, f"None or one of {', '.join(DTYPES)}")
        self.capacity, self.max_bytes = capacity, max_bytes
        self.dtype, self.device = dtype, device
        self.unconverged, self.compare, self.persistent = unconverged, compare, persistent
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # the least recently used first
        self._bytes = 0
        self._counts = dict.fromkeys(("hits", "misses", "mismatches", "rejected", "evictions"), 0)

    def __len__(self) -> int:
        """Return the number of stored states."""
        return len(self._entries)

    def __repr__(self) -> str:
        """Return the bounds and the counts."""
        return f"{OWNER}(capacity={self.capacity}, max_bytes={self.max_bytes}, {self.statistics})"

    @property
    def statistics(self) -> CacheStatistics:
        """The counts since the cache was made, and its size."""
        return CacheStatistics(**self._counts, entries=len(self._entries), bytes=self._bytes)

    def start(self, ids: Any, z0: Tree, changed: Any = None) -> Tree:
        """Return the initial iterate of a batch: stored states, and z0 for samples without one.

        Args:
            ids: the sample ids, integers `(batch,)`.
            z0: where other samples start, a tree whose leaves have the batch as their first axis.
            changed: parts of the state that begin at z0 in any case, see `deqcore.warm_start.restart_changed`.

        Returns:
            A tree like z0, in its dtypes and on its device.

        Raises:
            ConfigError: the ids are not integers `(batch,)`, or the batch is larger than the cache.
            BackendError: z0 has arrays of JAX.
        """
        backend, numbers, leaves, structure = self._opened(ids, z0)
        moving = [leaf for leaf in leaves if is_stored(backend, leaf)]
        layout, hits = _layout(backend, moving), {}
        for row, number in enumerate(numbers):
            entry = self._entries.get(number)
            if number >= 0:
                self._counts["misses" if entry is None else "hits" if entry.layout == layout else "mismatches"] += 1
            if entry is not None and entry.layout == layout:
                self._entries.move_to_end(number)
                hits[row] = entry.rows
        start = z0
        if hits:
            rows = backend.asarray(np.fromiter(hits, np.int64), dtype="int64", like=moving[0])
            parts = zip(moving, *hits.values(), strict=True)
            filled = iter([_filled(backend, leaf, rows, stored) for leaf, *stored in parts])
            start = backend.unflatten(structure, [next(filled) if is_stored(backend, x) else x for x in leaves])
        return start if changed is None else restart_changed(start, z0, changed)

    def store(self, ids: Any, solution: Solution) -> None:
        """Store the equilibria of a batch.

        Samples that have not converged (with `batch = 2`, of which a unit has not) or that are not finite in the dtype
        of the cache are not stored; what is stored for their ids stays.

        Args:
            ids: the sample ids, integers `(batch,)`.
            solution: of the solve.

        Raises:
            ConfigError: the ids are not integers `(batch,)`, or the batch (or one state) is larger than the cache.
            BackendError: the solution has arrays of JAX.
        """
        backend, numbers, leaves, _ = self._opened(ids, solution.value)
        moving = [leaf for leaf in leaves if is_stored(backend, leaf)]
        stored = [self._converted(backend, backend.detach(leaf)) for leaf in moving]
        keep = _finite(backend, stored, len(numbers)) & (self.unconverged | _converged(backend, solution, len(numbers)))
        wanted = {number: row for row, number in enumerate(numbers) if number >= 0 and keep[row]}
        self._counts["rejected"] += sum(number >= 0 for number, kept in zip(numbers, keep, strict=True) if not kept)
        if not wanted:
            return
        index = backend.asarray(np.arange(len(numbers)), dtype="int64", like=stored[0])
        layout = _layout(backend, moving)
        for number, row in wanted.items():
            self._put(number, layout, tuple(backend.take(leaf, index[row : row + 1]) for leaf in stored))
        self._make_room()

    def forget(self, ids: Any = None) -> None:
        """Drop stored states, such as those of samples whose inputs were replaced.

        Args:
            ids: the ids to drop, integers; None: all.

        Raises:
            ConfigError: the ids are not integers `(count,)`.
        """
        for number in list(self._entries) if ids is None else _numbers(ids):
            self._drop(number)

    def state_dict(self) -> dict[str, Array]:
        """Return the stored states as arrays, to save beside the weights; see `load_state_dict`.

        States of the same shapes share a group g: `"g.ids"` has their ids and the order of their last use,
        `(count, 2)` int64, and `"g.0"`, `"g.1"`, … the leaves `(count, …)`.
        """
        groups: dict[Layout, list[tuple[int, int]]] = {}
        for order, (number, entry) in enumerate(self._entries.items()):
            groups.setdefault(entry.layout, []).append((number, order))
        arrays: dict[str, Array] = {}
        for group, members in enumerate(groups.values()):
            parts = list(zip(*(self._entries[number].rows for number, _ in members), strict=True))
            backend = backend_of(parts[0][0])
            arrays[f"{group}.ids"] = backend.asarray(np.array(members, np.int64), dtype="int64", like=parts[0][0])
            arrays |= {f"{group}.{leaf}": backend.xp.concat(rows, axis=0) for leaf, rows in enumerate(parts)}
        return arrays

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Replace the stored states by those of `state_dict`. Beyond the bounds, the most recently used ones stay.

        The states need not have the dtype and the device of this cache. A state whose shape does not fit a solve is
        counted as a mismatch there, and the sample starts at z0.

        Args:
            state: what `state_dict` has returned; empty: nothing is stored afterwards.

        Raises:
            ConfigError: it is not the state of a cache.
        """
        loaded: list[tuple[int, int, Layout, tuple[Array, ...]]] = []
        for group in sorted({name.partition(".")[0] for name in state}):
            members, leaves = _group(state, group)
            backend = backend_of(leaves[0])
            stored = [self._converted(backend, backend.detach(leaf)) for leaf in leaves]
            index = backend.asarray(np.arange(len(members)), dtype="int64", like=stored[0])
            for row, (number, order) in enumerate(members):
                rows = tuple(backend.take(leaf, index[row : row + 1]) for leaf in stored)
                loaded.append((order, number, _layout(backend, leaves), rows))
        self.forget()
        for _, number, layout, rows in sorted(loaded, key=lambda item: item[0]):
            self._put(number, layout, rows)
        self._make_room()

    def _opened(self, ids: Any, tree: Tree) -> tuple[Backend, list[int], list[Any], Any]:
        """Return the backend, the ids, and the leaves and the structure of a state that fits them."""
        backend, numbers = backend_of(tree), _numbers(ids)
        if not backend.capabilities.eager:
            raise BackendError(
                f"{OWNER} changes itself, which code that {backend.name} compiles cannot do. Use "
                f"deqcore_jax.equilibrium_cache.EquilibriumCache, a value that goes into a step and comes out of it."
            )
        leaves, structure = backend.flatten(tree)
        for leaf in leaves:
            if is_stored(backend, leaf):
                check_batch(OWNER, len(numbers), tuple(leaf.shape))
        if self.capacity is not None and len({n for n in numbers if n >= 0}) > self.capacity:
            expected = f"at least the batch of {len(numbers)} samples"
            raise ConfigError.bad_value(OWNER, "capacity", self.capacity, expected)
        return backend, numbers, leaves, structure

    def _converted(self, backend: Backend, leaf: Array) -> Array:
        """Return a leaf in the dtype and on the device of the cache."""
        if self.device is not None:
            leaf = backend.to_device(leaf, self.device)
        if self.dtype is None or "complex" in backend.dtype_name(leaf):
            return leaf
        if self.dtype == "bfloat16" and not backend.capabilities.bfloat16:
            expected = f"None, float16, float32 or float64 with {backend.name}"
            raise ConfigError.bad_value(OWNER, "dtype", self.dtype, expected)
        with backend.errstate():
            return backend.astype(leaf, self.dtype)

    def _put(self, number: int, layout: Layout, rows: tuple[Array, ...]) -> None:
        size = sum(int(row.nbytes) for row in rows)
        if self.max_bytes is not None and size > self.max_bytes:
            raise ConfigError.bad_value(OWNER, "max_bytes", self.max_bytes, f"at least the {size} bytes of one state")
        self._drop(number)
        self._entries[number] = _Entry(layout, rows, size)
        self._bytes += size

    def _drop(self, number: int) -> None:
        entry = self._entries.pop(number, None)
        self._bytes -= 0 if entry is None else entry.bytes

    def _make_room(self) -> None:
        """Drop the least recently used states until the bounds hold."""
        while len(self._entries) > (self.capacity or len(self._entries)) or self._bytes > (
            self.max_bytes or self._bytes
        ):
            self._drop(next(iter(self._entries)))
            self._counts["evictions"] += 1


def _numbers(ids: Any) -> list[int]:
    """Return sample ids of any framework as integers."""
    numbers = np.asarray(ids.detach().cpu() if hasattr(ids, "detach") else ids)
    if numbers.size == 0 and not hasattr(ids, "dtype"):
        numbers = numbers.astype(np.int64)  # an empty list has no dtype of its own
    check_ids(OWNER, str(numbers.dtype), numbers.shape)
    return [int(number) for number in numbers]


def _layout(backend: Backend, leaves: list[Array]) -> Layout:
    return tuple(("complex" in backend.dtype_name(leaf), tuple(leaf.shape[1:])) for leaf in leaves)


def _filled(backend: Backend, leaf: Array, rows: Array, parts: list[Array]) -> Array:
    """Return a leaf of z0 with these rows replaced by stored ones."""
    part = backend.asarray(backend.xp.concat(list(parts), axis=0), like=leaf)
    return part if len(parts) == leaf.shape[0] else backend.put(leaf, rows, part)


def _finite(backend: Backend, leaves: list[Array], count: int) -> Any:
    """Return on the host which samples are finite in all leaves, `(batch,)` of bool."""
    finite = np.ones(count, bool)
    for leaf in leaves:
        flat = backend.xp.isfinite(leaf)
        axes = tuple(range(1, flat.ndim))
        finite &= np.asarray(backend.to_numpy(backend.xp.all(flat, axis=axes) if axes else flat), bool)
    return finite


def _converged(backend: Backend, solution: Solution, count: int) -> Any:
    """Return on the host which samples have converged in all units that took part, `(batch,)` of bool."""
    converged = np.asarray(backend.to_numpy(solution.converged), bool)
    if solution.mask is not None:
        converged = converged | ~np.asarray(backend.to_numpy(solution.mask), bool)
    if converged.shape[:1] != (count,):
        check_batch(OWNER, count, ())
    return converged if converged.ndim == 1 else converged.all(axis=1)


def _group(state: Mapping[str, Array], group: str) -> tuple[list[tuple[int, int]], list[Array]]:
    """Return ids with the order of their last use, and leaves, of a group of a checkpoint."""
    count = sum(name.partition(".")[0] == group for name in state) - 1
    leaves, ids = [state.get(f"{group}.{leaf}") for leaf in range(count)], state.get(f"{group}.ids")
    sizes = {tuple(leaf.shape[:1]) for leaf in leaves if leaf is not None}
    complete = leaves and all(leaf is not None for leaf in leaves)
    if ids is None or not complete or len(sizes) != 1 or tuple(ids.shape) != (*sizes.pop(), 2):
        expected = "what EquilibriumCache.state_dict returns: ids (count, 2) and leaves (count, ...) in each group"
        raise ConfigError.bad_value(OWNER, "state", {name: tuple(x.shape) for name, x in state.items()}, expected)
    members = np.asarray(backend_of(leaves[0]).to_numpy(ids)).tolist()
    return [(int(number), int(order)) for number, order in members], leaves
