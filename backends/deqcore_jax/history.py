"""A history in one preallocated array, as `lax.while_loop` requires."""

from __future__ import annotations

from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from deqcore.abc.history import History
from deqcore_jax.dtypes import common, single
from deqcore_jax.loop import is_recorded

STAGES: Final = (8, 16)
"""Slots that a product reads before it reads all of them, on a CPU."""

WIDE: Final = 4
"""Vectors of at least this many times `history_size` numbers are read by stages: one pass over others costs less."""


@jax.tree_util.register_pytree_node_class
class JaxHistory(History):
    """A ring of `(batch, history_size, n)`; a write touches one slot, which XLA updates in place inside a loop.

    `active` belongs to one step. It is not part of the pytree, so it does not outlive a step of a compiled loop.

    Attributes:
        storage: the vectors `(batch, history_size, n)`.
        seen: slots that each sample wrote since its last restart, `(batch, history_size)` of bool.
        written: appends so far, int32.
        dtype: the dtype of the state and of the results of `combine`; the storage may be narrower.
        wide: the dtype of dot products.
    """

    def __init__(
        self,
        storage: jax.Array,
        seen: jax.Array,
        written: jax.Array,
        dtype: DTypeLike,
        wide: DTypeLike,
        active: jax.Array | None = None,
    ) -> None:
        self.storage = storage
        self.seen = seen
        self.written = written
        self.dtype = dtype
        self.wide = wide
        self.active = active
        # The second last axis, also while a transformation carries an axis more.
        self.history_size = getattr(storage, "shape", (0, 0))[-2]

    @classmethod
    def empty(cls, like: jax.Array, history_size: int, dtype: DTypeLike, wide: DTypeLike) -> JaxHistory:
        """Make an empty history with room for `history_size` vectors like `like` `(batch, n)`, stored in `dtype`."""
        batch, n = like.shape
        # Made from `like`: inside shard_map a loop's carry must vary along the same axes of the mesh from the start.
        storage = jnp.zeros_like(like, dtype or like.dtype, shape=(batch, history_size, n))
        seen = jnp.zeros_like(like, bool, shape=(batch, history_size))
        return cls(storage, seen, jnp.zeros_like(like, jnp.int32, shape=()), like.dtype, wide)

    def tree_flatten(self) -> tuple[tuple[jax.Array, ...], tuple[DTypeLike, ...]]:
        """Return the arrays, and the dtypes beside them."""
        return (self.storage, self.seen, self.written), (self.dtype, self.wide)

    @classmethod
    def tree_unflatten(
        cls, dtypes: tuple[DTypeLike, DTypeLike], arrays: tuple[jax.Array, jax.Array, jax.Array]
    ) -> JaxHistory:
        """Undo `tree_flatten`; all rows are active again."""
        return cls(*arrays, *dtypes)

    def append(self, v: jax.Array) -> JaxHistory:
        """Write one slot; rows that are not active write back what they had."""
        slot = lax.rem(self.written, jnp.int32(self.history_size))
        new = v.astype(self.storage.dtype)[:, None, :]
        here = jnp.arange(self.history_size, dtype=jnp.int32)[None, :] == slot
        if self.active is not None:
            old = lax.dynamic_slice_in_dim(self.storage, slot, 1, axis=1)
            new = jnp.where(self.active[:, None, None], new, old)
            here = here & self.active[:, None]
        storage = lax.dynamic_update_slice_in_dim(self.storage, new, slot, axis=1)
        return self._with(storage, self.seen | here, self.written + 1)

    def dot(self, v: jax.Array) -> jax.Array:
        """Return the products by one pass over the slots in use, accumulated in float32 or better."""
        many = v if v.ndim == 3 else v[:, None, :]
        both = common(self.storage.dtype, many.dtype)  # equal narrow dtypes: products are exact in the accumulator
        many, dtype = many.astype(both), single(both)

        def of_first(slots: int) -> jax.Array:
            products = _einsum("brn,bmn->brm", many, self.storage[:, :slots].astype(both), dtype)
            return jnp.pad(products, ((0, 0), (0, 0), (0, self.history_size - slots)))

        stages = [slots for slots in STAGES if 2 * slots <= self.history_size] if self._by_use() else []
        chosen = jnp.searchsorted(jnp.asarray(stages, jnp.int32), self.written, method="compare_all")
        products = lax.switch(chosen, [partial(of_first, slots) for slots in [*stages, self.history_size]])
        products = jnp.where(self.seen[:, None, :], products.astype(self.wide), jnp.zeros((), self.wide))
        return products if v.ndim == 3 else products[:, 0]

    def combine(self, coefficients: jax.Array) -> jax.Array:
        """Return the combination by one pass over the slots in use; coefficients of slots not seen are ignored."""
        dtype = single(self.storage.dtype)
        c = jnp.where(self.seen, coefficients, jnp.zeros((), coefficients.dtype)).astype(dtype)
        if not self._by_use():
            return _einsum("bm,bmn->bn", c, self.storage.astype(dtype), dtype).astype(self.dtype)

        def add(slot: jax.Array, total: jax.Array) -> jax.Array:
            vector = lax.dynamic_index_in_dim(self.storage, slot, 1, keepdims=False)
            return total + lax.dynamic_slice_in_dim(c, slot, 1, axis=1) * vector.astype(dtype)

        nothing = jnp.zeros_like(self.storage[:, 0], dtype)
        return lax.fori_loop(0, self._used(), add, nothing).astype(self.dtype)

    def _by_use(self) -> bool:
        """Return whether products read only the slots in use.

        An accelerator would wait for the choice, and a recorded step would keep what every stage needs.
        """
        few = self.history_size < 2 * STAGES[0] or self.storage.shape[-1] < WIDE * self.history_size
        return not few and not is_recorded() and jax.default_backend() == "cpu"

    def _used(self) -> jax.Array:
        return jnp.minimum(self.written, jnp.int32(self.history_size))

    def restart(self, rows: jax.Array) -> JaxHistory:
        """Mask the slots that are not seen; nothing is erased."""
        chosen = rows if self.active is None else rows & self.active
        return self._with(self.storage, self.seen & ~chosen[:, None], self.written)

    def erase(self, rows: jax.Array) -> JaxHistory:
        """Write zeros, because products with masked slots are still computed."""
        chosen = rows if self.active is None else rows & self.active
        storage = jnp.where(chosen[:, None, None], jnp.zeros((), self.storage.dtype), self.storage)
        return self._with(storage, self.seen, self.written)

    def rewind(self, count: int | jax.Array) -> JaxHistory:
        """Advance by the rest of the ring, so that `written` never falls."""
        rest = lax.rem(jnp.int32(self.history_size) - jnp.asarray(count, jnp.int32), jnp.int32(self.history_size))
        return self._with(self.storage, self.seen, self.written + rest)

    def skip(self, count: int | jax.Array = 1) -> JaxHistory:
        """Count slots as written that no sample sees."""
        return self._with(self.storage, self.seen, self.written + jnp.asarray(count, jnp.int32))

    def slot(self) -> jax.Array:
        """Return the slot before `written`."""
        last = lax.rem(self.written + (self.history_size - 1), jnp.int32(self.history_size))
        return (jnp.arange(self.history_size, dtype=jnp.int32) == last) & (self.written > 0)

    def count(self) -> jax.Array:
        """Return the sum of `seen`."""
        return jnp.sum(self.seen, axis=1, dtype=jnp.int32)

    def full(self) -> jax.Array:
        """Return whether the sample still sees the slot that comes next."""
        return self.seen[:, lax.rem(self.written, jnp.int32(self.history_size))]

    def masked(self, active: jax.Array | None) -> JaxHistory:
        """Return a history that shares the arrays."""
        return JaxHistory(self.storage, self.seen, self.written, self.dtype, self.wide, active)

    def vectors(self) -> jax.Array:
        """Return all `history_size` slots, zero where not seen."""
        return jnp.where(self.seen[:, :, None], self.storage, jnp.zeros((), self.storage.dtype))

    def merge(self, rows: jax.Array, other: History) -> JaxHistory:
        """Select per sample; the next slot is that of `other` only if no sample of this history is left."""
        assert isinstance(other, JaxHistory)
        storage = jnp.where(rows[:, None, None], other.storage, self.storage)
        seen = jnp.where(rows[:, None], other.seen, self.seen)
        later = jnp.maximum(self.written, other.written)
        return self._with(storage, seen, jnp.where(jnp.all(rows), other.written, later))

    def detach(self) -> JaxHistory:
        """Detach the vectors; masks have no gradient."""
        return self._with(lax.stop_gradient(self.storage), self.seen, self.written)

    def copy(self) -> JaxHistory:
        """Return this history itself, because nothing is written in place."""
        return self

    def _with(self, storage: jax.Array, seen: jax.Array, written: jax.Array) -> JaxHistory:
        return JaxHistory(storage, seen, written, self.dtype, self.wide, self.active)


def _einsum(subscripts: str, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=dtype, precision=lax.Precision.HIGHEST)
