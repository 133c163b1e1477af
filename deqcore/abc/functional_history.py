"""A history that any tape can follow: nothing is ever written in place. The default of `Backend.history`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deqcore.abc.arrays import ArrayOps
from deqcore.abc.history import History
from deqcore.types import Array


class _Shared(NamedTuple):
    """The constants of all states of one history."""

    backend: ArrayOps
    history_size: int
    dtype: str  # of the state and of the results of `combine`; the slots may be narrower


class FunctionalHistory(History):
    """A history with one array `(batch, n)` per slot, and a mask of the samples that see it.

    Each operation costs one array operation per slot. A ring in one array costs one in all: a backend with such a ring
    overrides `Backend.history`.
    """

    def __init__(self, shared: _Shared, slots: tuple[Array, ...], seen: Array, written: int, active: Array | None):
        self.shared, self.slots, self.seen, self.written, self.active = shared, slots, seen, written, active
        self.history_size = shared.history_size

    @classmethod
    def empty(cls, backend: ArrayOps, like: Array, history_size: int, dtype: str | None = None) -> FunctionalHistory:
        """Return a history without a vector, for vectors like `like` `(batch, n)`."""
        still = backend.detach(like)
        zero = backend.xp.zeros_like(backend.astype(still, dtype or backend.dtype_name(like)))
        unseen = backend.xp.broadcast_to(backend.xp.sum(zero, axis=1)[:, None] > 0, (like.shape[0], history_size))
        return cls(_Shared(backend, history_size, backend.dtype_name(like)), (zero,) * history_size, unseen, 0, None)

    def _with(self, **changes: object) -> FunctionalHistory:
        kept = {"slots": self.slots, "seen": self.seen, "written": self.written, "active": self.active}
        return FunctionalHistory(self.shared, **{**kept, **changes})

    def _at(self, slot: int, there: bool = True) -> Array:
        """Return a one-hot mask `(history_size,)`."""
        return self.shared.backend.asarray(there & (np.arange(self.history_size) == slot), like=self.seen)

    def append(self, v: Array) -> FunctionalHistory:
        """See `History.append`."""
        backend, at = self.shared.backend, self.written % self.history_size
        new = backend.cast(v, self.slots[at])
        if self.active is None:
            seen = self.seen | self._at(at)
        else:
            seen = self.seen | (self.active[:, None] & self._at(at))
            new = backend.select(self.active, new, self.slots[at])
        return self._with(slots=(*self.slots[:at], new, *self.slots[at + 1 :]), seen=seen, written=self.written + 1)

    def dot(self, v: Array) -> Array:
        """See `History.dot`."""
        backend, xp = self.shared.backend, self.shared.backend.xp
        many = backend.to_accum_dtype(v if v.ndim == 3 else v[:, None, :])
        with backend.errstate():
            per_slot = [xp.sum(many * backend.to_accum_dtype(q)[:, None, :], axis=2) for q in self.slots]
            products = xp.stack(per_slot, axis=2)
        products = xp.where(self.seen[:, None, :], products, xp.zeros_like(products))
        return products if v.ndim == 3 else products[:, 0, :]

    def combine(self, coefficients: Array) -> Array:
        """See `History.combine`."""
        backend, xp = self.shared.backend, self.shared.backend.xp
        c = backend.to_accum_dtype(xp.where(self.seen, coefficients, xp.zeros_like(coefficients)))
        with backend.errstate():
            total = sum(c[:, j, None] * backend.to_accum_dtype(q) for j, q in enumerate(self.slots))
        return backend.astype(total, self.shared.dtype)

    def restart(self, rows: Array) -> FunctionalHistory:
        """See `History.restart`."""
        chosen = rows if self.active is None else rows & self.active
        return self._with(seen=self.seen & ~chosen[:, None])

    def erase(self, rows: Array) -> FunctionalHistory:
        """See `History.erase`."""
        backend, chosen = self.shared.backend, rows if self.active is None else rows & self.active
        slots = tuple(backend.select(chosen, backend.xp.zeros_like(q), q) for q in self.slots)
        return self._with(slots=slots)

    def rewind(self, count: int | Array) -> FunctionalHistory:
        """See `History.rewind`."""
        return self._with(written=self.written + (self.history_size - int(count)) % self.history_size)

    def slot(self) -> Array:
        """See `History.slot`."""
        return self._at((self.written - 1) % self.history_size, self.written > 0)

    def count(self) -> Array:
        """See `History.count`."""
        backend = self.shared.backend
        return backend.astype(backend.xp.sum(backend.astype(self.seen, "int32"), axis=1), "int32")

    def full(self) -> Array:
        """See `History.full`."""
        return self.seen[:, self.written % self.history_size]

    def masked(self, active: Array | None) -> FunctionalHistory:
        """See `History.masked`."""
        return self._with(active=active)

    def vectors(self) -> Array:
        """See `History.vectors`."""
        xp, used = self.shared.backend.xp, min(self.written, self.history_size)
        kept = xp.stack(self.slots[: used or 1], axis=1)
        return xp.where(self.seen[:, : used or 1, None], kept, xp.zeros_like(kept))[:, :used]

    def merge(self, rows: Array, other: History) -> FunctionalHistory:
        """See `History.merge`."""
        assert isinstance(other, FunctionalHistory)
        backend = self.shared.backend
        if backend.known_all(rows):
            return other
        slots = tuple(backend.select(rows, new, old) for new, old in zip(other.slots, self.slots, strict=True))
        seen = backend.select(rows, other.seen, self.seen)
        return self._with(slots=slots, seen=seen, written=max(self.written, other.written))

    def detach(self) -> FunctionalHistory:
        """See `History.detach`."""
        return self._with(slots=tuple(self.shared.backend.detach(slot) for slot in self.slots))

    def copy(self) -> FunctionalHistory:
        """Return this history itself, because nothing is written in place."""
        return self
