"""The contract of a growing list of vectors per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from deqcore.types import Array

LONGEST: Final = 2**31 - 1
"""Slots at most: they are counted in int32, on every backend."""


class History(ABC):
    """A growing list of vectors per sample, with the four operations that Broyden, Anderson and GMRES need.

    The storage is a ring of `history_size` slots that all samples share: the k-th append writes slot
    `k % history_size`. Every sample sees only the slots that it wrote since its last restart; in the other slots its
    dot products are exactly zero and its coefficients are ignored. Overwriting a slot that a sample still sees is the
    caller's responsibility (sound for Anderson, unsound for Broyden, which restarts first).

    Attributes:
        active: rows that `append` and `restart` may change, `(batch,)` of bool, or None for all.
        history_size: number of slots.

    Example:
        >>> import numpy as np, deqcore
        >>> be = deqcore.get_backend(backend="numpy")
        >>> history = be.history(np.zeros((1, 2)), history_size=3).append(np.array([[3.0, 4.0]]))
        >>> history.dot(np.array([[1.0, 1.0]])).tolist()
        [[7.0, 0.0, 0.0]]
    """

    active: Array | None
    history_size: int

    @abstractmethod
    def append(self, v: Array) -> History:
        """Write `v` `(batch, n)` into the next slot of every active row."""

    @abstractmethod
    def dot(self, v: Array) -> Array:
        """Return the inner products of all vectors with `v`: `(batch, history_size)`, zero in slots not seen.

        `v` is `(batch, n)`; several vectors `(batch, r, n)` share one pass over the storage and give
        `(batch, r, history_size)`. The result is in the wide dtype (`Backend.to_accum_dtype`).
        """

    @abstractmethod
    def combine(self, coefficients: Array) -> Array:
        """Return Σ_j c_j q_j for coefficients `(batch, history_size)`: `(batch, n)` in the state's dtype."""

    def may_be_full(self) -> bool:
        """Return False only if it is known, without waiting for a device, that no active sample is full."""
        return True

    def all_full(self) -> bool:
        """Return True only if it is known, without waiting for a device, that every active sample is full.

        A backend may assume that rows only leave `active`, as in a solve, until `masked(None)` is called.
        """
        return False

    def append_difference(self, a: Array, b: Array) -> History:
        """Return `append(a - b)`; a backend may spare the temporary."""
        return self.append(a - b)

    def add_combination(self, base: Array, coefficients: Array) -> Array:
        """Return `base + combine(coefficients)`, `(batch, n)`; a backend may spare the temporary."""
        return base + self.combine(coefficients)

    @abstractmethod
    def restart(self, rows: Array) -> History:
        """Forget the vectors of the active rows among `rows` `(batch,)` of bool."""

    @abstractmethod
    def erase(self, rows: Array) -> History:
        """Write zeros over the vectors of the active rows among `rows` `(batch,)` of bool, which may hold NaN or inf.

        The sample still sees these slots, so it becomes full together with the rest of the batch.
        """

    def restart_active(self) -> History:
        """Forget the vectors of all active rows, so that a backend can know when they are all full again."""
        return self.restart(self.count() >= 0 if self.active is None else self.active)

    @abstractmethod
    def rewind(self, count: int | Array) -> History:
        """Move the next slot of a ring whose slots are all written back by `count`, or on if that is below 0.

        No vector is forgotten. After `count` appends the next slot is that of before, so a sample that begins again
        with several vectors takes no slot from the samples beside it.

        Args:
            count: fewer than `history_size` slots, int or an int32 scalar of the backend. A backend that counts on the
                host waits for the scalar.
        """

    def skip(self, count: int | Array = 1) -> History:
        """Move the next slot on by `count`, as appends of no sample do, without storage for them.

        A method whose samples begin to store at different steps keeps the slot of each step the same in any batch.

        Args:
            count: at least 0, int or an int32 scalar of the backend, as for `rewind`.
        """
        return self.rewind(-count)

    @abstractmethod
    def slot(self) -> Array:
        """Return the one-hot mask `(history_size,)` of the slot that was written last; all False before an append."""

    @abstractmethod
    def count(self) -> Array:
        """Return how many vectors each sample sees: `(batch,)` int32."""

    def full(self) -> Array:
        """Return whether the next append would overwrite a vector that the sample still sees: `(batch,)` of bool.

        This differs from `count() == history_size` for a sample that was frozen while the ring moved on and continues
        now (a continued solve): its oldest vectors may be in the next slot. A backend with such a ring overrides this.
        """
        return self.count() >= self.history_size

    @abstractmethod
    def masked(self, active: Array | None) -> History:
        """Return the same history with other active rows; the storage is shared."""

    def finalized(self) -> History:
        """Return the history to keep after the solve: all rows active, no storage reserved for a next step."""
        return self.masked(None)

    @abstractmethod
    def vectors(self) -> Array:
        """Return the stored vectors `(batch, used, n)` of the slots written so far; in traced code of all slots."""

    def detach(self) -> History:
        """Return the same numbers without gradients. Only a history that a tape can follow needs it."""
        return self

    @abstractmethod
    def copy(self) -> History:
        """Return a history with separate storage, so that a continued solve does not change an earlier estimate."""

    def merge(self, rows: Array, other: History) -> History:
        """Return `other`, which was begun later, in the samples `rows` `(batch,)` of bool, and this history elsewhere.

        Both have the same `history_size`. Each vector keeps its slot, so that one-hot masks of it stay right. The next
        append goes to the next slot of this history, or of `other` if all samples are among `rows`.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot continue for some samples only. Implement `merge`.")

    def take(self, rows: Array) -> History:
        """Return the same vectors of these samples only (indices `(k,)`), all active, in separate storage.

        A backend with the capability `compaction` implements this and `put`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not offer compaction.")

    def put(self, rows: Array, part: History) -> History:
        """Return this history with `rows` continued as in `part`, which began as `take(rows)`."""
        raise NotImplementedError(f"{type(self).__name__} does not offer compaction.")
