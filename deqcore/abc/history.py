"""The contract of a growing list of vectors per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from deqcore.types import Array

LONGEST: Final = 2**31 - 1
"""Slots at most: they are counted in int32, on every backend."""


class History(ABC):
    """A growing list of vectors per sample, with the four operations that Broyden, Anderson and GMRES need.

    Storage is a ring of `history_size` slots that all samples share: the k-th append writes slot `k % history_size`. Every
    sample sees only the slots that it wrote since its last restart; in the others its dot products are exactly zero
    and its coefficients are ignored. Overwriting a slot that a sample still sees is the caller's responsibility
    (sound for Anderson, unsound for Broyden, which restarts first).

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
        """Inner products of all vectors with `v`: `(batch, history_size)`, zero in slots not seen.

        `v` is `(batch, n)`; several vectors `(batch, r, n)` share one pass over the storage and give
        `(batch, r, history_size)`. The result is in the wide dtype (`Backend.to_accum_dtype`).
        """

    @abstractmethod
    def combine(self, coefficients: Array) -> Array:
        """Σ_j c_j q_j for coefficients `(batch, history_size)`: `(batch, n)` in the state's dtype."""

    def may_be_full(self) -> bool:
        """False only if it is known, without waiting for a device, that no active sample is full."""
        return True

    def all_full(self) -> bool:
        """True only if it is known, without waiting for a device, that every active sample is full.

        A backend may take it that rows only leave `active`, as in a solve; `masked(None)` ends that.
        """
        return False

    def append_difference(self, a: Array, b: Array) -> History:
        """`append(a - b)`; a backend may spare the temporary."""
        return self.append(a - b)

    def add_combination(self, base: Array, coefficients: Array) -> Array:
        """`base + combine(coefficients)`, `(batch, n)`; a backend may spare the temporary."""
        return base + self.combine(coefficients)

    @abstractmethod
    def restart(self, rows: Array) -> History:
        """Forget the vectors of the active rows among `rows` `(batch,)` of bool."""

    @abstractmethod
    def erase(self, rows: Array) -> History:
        """Write zeros over the vectors of the active rows among `rows` `(batch,)` of bool, which may hold NaN or inf.

        The sample goes on seeing these slots. So it is full when it would have been, together with its batch mates.
        """

    def restart_active(self) -> History:
        """Forget the vectors of all active rows, so that a backend can know when they are all full again."""
        return self.restart(self.count() >= 0 if self.active is None else self.active)

    @abstractmethod
    def slot(self) -> Array:
        """One-hot mask `(history_size,)` of bool of the slot that was written last; all False before the first append."""

    @abstractmethod
    def count(self) -> Array:
        """How many vectors each sample sees: `(batch,)` int32."""

    def full(self) -> Array:
        """Whether the next append would overwrite a vector that the sample still sees: `(batch,)` of bool.

        Not the same as `count() == history_size` for a sample that was frozen while the ring moved on and goes on now
        (a continued solve): its oldest vectors may stand in the next slot. Such a backend overrides this.
        """
        return self.count() >= self.history_size

    @abstractmethod
    def masked(self, active: Array | None) -> History:
        """The same history with other active rows. Shares storage."""

    def finalized(self) -> History:
        """The same history for who keeps it after the solve: all rows active, and nothing held for a next step."""
        return self.masked(None)

    @abstractmethod
    def vectors(self) -> Array:
        """The stored vectors, `(batch, used, n)`: the slots written so far (all `history_size` slots in traced code)."""

    def detach(self) -> History:
        """The same numbers, without gradients. Only a history that a tape can follow needs it."""
        return self

    @abstractmethod
    def copy(self) -> History:
        """A history with storage of its own, so that continuing a solve leaves the first solve's estimate alone."""

    def merge(self, rows: Array, other: History) -> History:
        """`other`, which has been begun later, in the samples `rows` `(batch,)` of bool, and this history elsewhere.

        Both have one memory. Each vector keeps its slot, so that one-hot masks of it stay right. The next append is
        this history's, or that of `other` where all samples are among `rows`.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot go on for some samples only: write `merge`.")

    def take(self, rows: Array) -> History:
        """The same vectors of these samples only (indices `(k,)`), all active, with storage of its own.

        With `put` what a backend with the capability `compaction` offers.
        """
        raise NotImplementedError(f"{type(self).__name__} does not offer compaction.")

    def put(self, rows: Array, part: History) -> History:
        """This history, gone on with as `part`, which `take(rows)` began: other rows saw nothing of it."""
        raise NotImplementedError(f"{type(self).__name__} does not offer compaction.")
