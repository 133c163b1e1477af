"""A functional history: every operation returns a new one, as in a framework that traces."""

from __future__ import annotations

from typing import Any

import numpy as np

from deqcore.abc.history import History
from deqcore.testing.strict.array import StrictArray, unwrap, wrap
from deqcore.types import Array


class StrictHistory(History):
    """The NumPy backend's history behind the wall, copied before it is changed; whether it is full is never known.

    `vectors` has all `history_size` slots, as in traced code, where the number of steps is not known.
    """

    def __init__(self, inner: History) -> None:
        self.inner = inner
        self.history_size = inner.history_size

    @property
    def active(self) -> Array | None:  # type: ignore[override]
        """The active rows."""
        return wrap(self.inner.active)

    @property
    def kind(self) -> tuple[object, ...]:
        """What must stay as it is from step to step: shape and dtype of the storage."""
        storage: Any = self.inner
        return storage.storage.shape, storage.storage.dtype, storage.dtype

    def append(self, v: Array) -> StrictHistory:
        """Write into a copy."""
        return StrictHistory(self.inner.copy().append(unwrap(_strict(v))))

    def dot(self, v: Array) -> Array:
        """Call `dot` of the inner history."""
        return wrap(self.inner.dot(unwrap(_strict(v))))

    def combine(self, coefficients: Array) -> Array:
        """Call `combine` of the inner history."""
        return wrap(self.inner.combine(unwrap(_strict(coefficients))))

    def restart(self, rows: Array) -> StrictHistory:
        """Call `restart` of the inner history."""
        return StrictHistory(self.inner.restart(unwrap(_strict(rows))))

    def erase(self, rows: Array) -> StrictHistory:
        """Write into a copy."""
        return StrictHistory(self.inner.copy().erase(unwrap(_strict(rows))))

    def rewind(self, count: int | Array) -> StrictHistory:
        """Rewind the inner history."""
        return StrictHistory(self.inner.rewind(unwrap(count)))

    def slot(self) -> Array:
        """Call `slot` of the inner history."""
        return wrap(self.inner.slot())

    def count(self) -> Array:
        """Call `count` of the inner history."""
        return wrap(self.inner.count())

    def full(self) -> Array:
        """Call `full` of the inner history."""
        return wrap(self.inner.full())

    def masked(self, active: Array | None) -> StrictHistory:
        """Call `masked` of the inner history."""
        return StrictHistory(self.inner.masked(unwrap(active)))

    def vectors(self) -> Array:
        """Return all slots, zero where nothing was written."""
        used: Any = self.inner.vectors()
        shape, dtype, _ = self.kind
        result = np.zeros(shape, dtype)  # type: ignore[call-overload]
        result[:, : used.shape[1]] = used
        return wrap(result)

    def merge(self, rows: Array, other: History) -> StrictHistory:
        """Merge into a copy of the inner history."""
        assert isinstance(other, StrictHistory), (
            "merge must get a history of the strict backend. Build both with backend.history."
        )
        return StrictHistory(self.inner.copy().merge(unwrap(rows), other.inner))

    def copy(self) -> StrictHistory:
        """Itself: it is never written to."""
        return self


def _strict(v: Any) -> StrictArray:
    if not isinstance(v, StrictArray):
        raise TypeError(f"A vector of a history must be an array of the backend (got a {type(v).__name__}).")
    return v
