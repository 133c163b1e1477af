"""A history that a tape can follow: nothing is ever written in place."""

from __future__ import annotations

from typing import Any

import autograd.numpy as anp
import numpy as np

from deqcore.backend import History


class TapeHistory(History):
    """One array per slot, `(batch, n)`, and for each the samples that see it."""

    def __init__(self, slots: tuple[Any, ...], seen: Any, dtype: Any, written: int = 0, active: Any = None) -> None:
        self.slots, self.seen, self.dtype, self.written, self.active = slots, seen, dtype, written, active
        self.memory = len(slots)

    @classmethod
    def empty(cls, like: Any, memory: int, dtype: str | None) -> TapeHistory:
        zero = np.zeros(like.shape, dtype or like.dtype)
        return cls((zero,) * memory, np.zeros((like.shape[0], memory), bool), like.dtype)

    def append(self, v: Any) -> TapeHistory:
        at, seen = self.written % self.memory, self.seen.copy()
        rows = np.ones(len(seen), bool) if self.active is None else self.active
        seen[rows, at] = True
        new = anp.where(rows[:, None], v.astype(self.slots[at].dtype), self.slots[at])
        slots = (*self.slots[:at], new, *self.slots[at + 1 :])
        return TapeHistory(slots, seen, self.dtype, self.written + 1, self.active)

    def dot(self, v: Any) -> Any:
        many = v if v.ndim == 3 else v[:, None, :]
        found = [anp.sum(many.astype("float64") * q[:, None, :].astype("float64"), axis=2) for q in self.slots]
        stacked = anp.where(self.seen[:, None, :], anp.stack(found, axis=2), 0.0)
        return stacked if v.ndim == 3 else stacked[:, 0]

    def combine(self, coefficients: Any) -> Any:
        c = anp.where(self.seen, coefficients, 0.0)
        total = sum(c[:, j, None] * q.astype("float64") for j, q in enumerate(self.slots))
        return total.astype(self.dtype)

    def restart(self, rows: Any) -> TapeHistory:
        chosen = rows if self.active is None else rows & self.active
        return TapeHistory(self.slots, self.seen & ~chosen[:, None], self.dtype, self.written, self.active)

    def slot(self) -> Any:
        mask = np.zeros(self.memory, bool)
        mask[(self.written - 1) % self.memory] = self.written > 0
        return mask

    def count(self) -> Any:
        return self.seen.sum(axis=1, dtype=np.int32)

    def full(self) -> Any:
        return self.seen[:, self.written % self.memory]

    def with_active(self, active: Any) -> TapeHistory:
        return TapeHistory(self.slots, self.seen, self.dtype, self.written, active)

    def vectors(self) -> Any:
        used = min(self.written, self.memory)
        kept = anp.stack(self.slots[:used], axis=1) if used else np.zeros((len(self.seen), 0, *self.slots[0].shape[1:]))
        return anp.where(self.seen[:, :used, None], kept, 0.0)

    def copy(self) -> TapeHistory:
        return self
