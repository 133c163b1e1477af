"""Operations on numbers: exponents, magnitudes, real and imaginary parts, scalars of the loops, random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deqcore.abc.arrays import ArrayOps
from deqcore.types import Array


class NumberOps:
    """Operations on numbers that the array API standard lacks. Only `from_pairs` has no default.

    Example:
        >>> import deqcore
        >>> be = deqcore.get_backend(backend="numpy")
        >>> be.numbers.power_of_two(be.asarray([5.0, 0.3])).tolist()
        [4.0, 0.25]
    """

    def __init__(self, be: ArrayOps) -> None:
        """Make the part of the backend `be`."""
        self.be = be

    def max_abs(self, v: Array, like: Array) -> Array:
        """Return the largest |v_i| of each row of `v` `(batch, n)`: `(batch,)`, in the dtype of `like`."""
        xp = self.be.xp
        return self.be.cast(xp.max(xp.abs(self.be.detach(v)), axis=1), like) if v.shape[1] else xp.zeros_like(like)

    def power_of_two(self, x: Array) -> Array:
        """Return the largest power of two that is at most x > 0; exact to the bit if the backend overrides it."""
        return 2.0 ** self.be.xp.floor(self.be.xp.log2(x))

    def to_pairs(self, x: Array) -> Array:
        """Return a complex array as a real one with a last axis of 2, real and imaginary part."""
        return self.be.xp.stack((self.be.xp.real(x), self.be.xp.imag(x)), axis=-1)

    def from_pairs(self, x: Array) -> Array:
        """Undo `to_pairs`; gradients pass through both by the framework's own convention. With `complex` only."""
        raise NotImplementedError(f"{type(self).__name__} does not offer complex states.")

    def normal(self, like: Array, seed: int, index: Sequence[Any]) -> Array:
        """Return standard normal numbers of the shape and dtype of `like`, a function of the seed and the index alone.

        Args:
            like: `(batch, n)`.
            seed: at least 0.
            index: integers of at least 0; a tracing backend also takes traced scalars.
        """
        drawn = np.random.default_rng([seed, *map(int, index)]).standard_normal(tuple(like.shape))
        return self.be.cast(self.be.asarray(drawn, like=like), like)

    def as_scalar(self, value: Any, like: Array) -> Any:
        """Convert a tolerance or step budget to the form that the loops of this backend take.

        Eager backends keep the Python number. A tracing backend makes it an array (an integer stays an integer, a float
        takes the dtype of norms of `like`), so that another value recompiles nothing.
        """
        return value
