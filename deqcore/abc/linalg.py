"""Small linear algebra, per sample: the systems of a solver's history, not those of the state."""

from __future__ import annotations

from abc import ABC, abstractmethod

from deqcore.abc.arrays import ArrayOps
from deqcore.types import Array


class SmallLinalg(ABC):
    """Solves batches of small dense systems. Only `solve` has no default.

    Example:
        >>> import deqcore
        >>> be = deqcore.get_backend(backend="numpy")
        >>> be.linalg.solve(2.0 * be.xp.ones((1, 1, 1)), be.xp.ones((1, 1))).tolist()
        [[0.5]]
    """

    def __init__(self, be: ArrayOps) -> None:
        """Make the part of the backend `be`."""
        self.be = be

    @abstractmethod
    def solve(self, a: Array, b: Array) -> Array:
        """Solve the small systems `a` `(batch, k, k)` for `b` `(batch, k)` or `(batch, k, r)`.

        A singular system gives non-finite numbers in its own row; it neither raises nor touches another row.
        """

    def solve_upper(self, a: Array, b: Array) -> Array:
        """Solve as `solve` does for upper triangular `a`; worth overriding if elimination costs more than f."""
        return self.solve(a, b)

    def solve_positive(self, a: Array, b: Array) -> Array:
        """Solve as `solve` does for `a` that is symmetric and positive definite to rounding."""
        return self.solve(a, b)

    def least_singular_value(self, a: Array, columns: Array) -> Array:
        """Return the least singular value of each of the matrices `a` `(batch, m, k)`, m ≥ k: `(batch,)`.

        From index `columns` (a scalar int32) on, column j is c·e_{j+1}, with c at least the norm of any other column
        and all other columns zero in that row. Traced code, whose shapes cannot shrink, may skip these columns.
        """
        return self.be.xp.min(self.be.xp.linalg.svdvals(a), axis=1)

    def eye(self, like: Array, rows: int, columns: int | None = None) -> Array:
        """Return the identity `(rows, columns)` in the dtype and on the device of `like` (which traced arrays hide)."""
        return self.be.xp.eye(rows, columns, dtype=like.dtype, device=like.device)

    def invert(self, x: Array, floor: Array) -> Array:
        """Return 1/x where |x| > floor, 0 elsewhere (also for NaN); `x` and `floor` have shape `(batch,)`."""
        xp = self.be.xp
        sound = xp.abs(x) > floor
        return xp.where(sound, 1.0 / xp.where(sound, x, xp.ones_like(x)), xp.zeros_like(x))
