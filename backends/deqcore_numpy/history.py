"""A history in one NumPy array: the plainest form of the contract."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deqcore.abc.history import History

UNIT = 4  # slots per product: how many are in use depends on the batch, and BLAS rounds by their number


class NumpyHistory(History):
    """A ring of `(batch, history_size, n)`. The operating system commits its zero pages as steps fill them."""

    def __init__(
        self,
        storage: NDArray[Any],
        seen: NDArray[np.bool_],
        dtype: np.dtype[Any],
        written: int = 0,
        active: NDArray[np.bool_] | None = None,
    ) -> None:
        self.storage = storage
        self.seen = seen  # (batch, memory)
        self.dtype = dtype  # of the state and of the results of combine; the storage may be narrower
        self.written = written
        self.active = active
        self.history_size = storage.shape[1]

    def _used(self) -> int:
        return min(self.written, self.history_size)

    def append(self, v: NDArray[Any]) -> NumpyHistory:
        slot = self.written % self.history_size
        seen = self.seen.copy()
        if self.active is None:
            self.storage[:, slot] = v
            seen[:, slot] = True
        else:
            self.storage[self.active, slot] = v[self.active]
            seen[self.active, slot] = True
        return NumpyHistory(self.storage, seen, self.dtype, self.written + 1, self.active)

    def dot(self, v: NDArray[Any]) -> NDArray[Any]:
        many = v if v.ndim == 3 else v[:, None, :]
        products = np.zeros((v.shape[0], many.shape[1], self.history_size))
        compute = np.promote_types(self.storage.dtype, np.float32)
        many = many.astype(compute, copy=False)
        for start in range(0, self._used(), UNIT):
            rows = self.storage[:, start : start + UNIT].astype(compute, copy=False)
            products[:, :, start : start + UNIT] = np.matmul(many, rows.swapaxes(1, 2))
        products = np.where(self.seen[:, None, :], products, 0.0)
        return products if v.ndim == 3 else products[:, 0]

    def combine(self, coefficients: NDArray[Any]) -> NDArray[Any]:
        compute = np.promote_types(self.storage.dtype, np.float32)
        c = np.where(self.seen, coefficients, 0.0)[:, None].astype(compute)
        total = np.zeros((c.shape[0], 1, self.storage.shape[2]), compute)
        for start in range(0, self._used(), UNIT):
            rows = self.storage[:, start : start + UNIT].astype(compute, copy=False)
            total += np.matmul(c[:, :, start : start + UNIT], rows)
        combination: NDArray[Any] = total[:, 0].astype(self.dtype, copy=False)
        return combination

    def restart(self, rows: NDArray[np.bool_]) -> NumpyHistory:
        chosen = rows if self.active is None else rows & self.active
        seen = np.where(chosen[:, None], False, self.seen)
        return NumpyHistory(self.storage, seen, self.dtype, self.written, self.active)

    def erase(self, rows: NDArray[np.bool_]) -> NumpyHistory:
        self.storage[rows if self.active is None else rows & self.active] = 0
        return self

    def rewind(self, count: int | NDArray[Any]) -> NumpyHistory:
        written = self.written + (self.history_size - int(count)) % self.history_size
        return NumpyHistory(self.storage, self.seen, self.dtype, written, self.active)

    def slot(self) -> NDArray[np.bool_]:
        mask = np.zeros(self.history_size, bool)
        if self.written:
            mask[(self.written - 1) % self.history_size] = True
        return mask

    def count(self) -> NDArray[np.int32]:
        count: NDArray[np.int32] = self.seen.sum(axis=1, dtype=np.int32)
        return count

    def full(self) -> NDArray[np.bool_]:
        next_seen: NDArray[np.bool_] = self.seen[:, self.written % self.history_size]
        return next_seen

    def may_be_full(self) -> bool:
        full = self.full()
        return bool((full if self.active is None else full & self.active).any())

    def masked(self, active: NDArray[np.bool_] | None) -> NumpyHistory:
        return NumpyHistory(self.storage, self.seen, self.dtype, self.written, active)

    def vectors(self) -> NDArray[Any]:
        return np.where(self.seen[:, : self._used(), None], self.storage[:, : self._used()], 0)

    def copy(self) -> NumpyHistory:
        return NumpyHistory(self.storage.copy(), self.seen, self.dtype, self.written, self.active)

    def merge(self, rows: NDArray[np.bool_], other: History) -> NumpyHistory:
        assert isinstance(other, NumpyHistory)
        if rows.all():
            return other
        self.storage[rows] = other.storage[rows]
        seen = np.where(rows[:, None], other.seen, self.seen)
        return NumpyHistory(self.storage, seen, self.dtype, max(self.written, other.written), self.active)

    def take(self, rows: NDArray[np.bool_]) -> NumpyHistory:
        return NumpyHistory(self.storage[rows], self.seen[rows], self.dtype, self.written)

    def put(self, rows: NDArray[np.bool_], part: History) -> NumpyHistory:
        assert isinstance(part, NumpyHistory)
        self.storage[rows] = part.storage
        seen = self.seen.copy()
        seen[rows] = part.seen
        return NumpyHistory(self.storage, seen, self.dtype, part.written, self.active)
