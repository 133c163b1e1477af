"""The contract of an estimate of the inverse Jacobian."""

from __future__ import annotations

from abc import ABC, abstractmethod

from deqcore.types import Array


class InverseJacobian(ABC):
    """H ≈ (∂(f − z)/∂z)^-1 per sample, as a linear operator on `(batch, n)`.

    Example:
        >>> import numpy as np
        >>> class Exact(InverseJacobian):  # of f(z) = z / 2 + 1, whose ∂(f − z)/∂z is −1/2
        ...     def apply(self, v):
        ...         return -2.0 * v
        ...     def apply_transpose(self, v):
        ...         return -2.0 * v
        >>> Exact().apply_transpose_unregularised(np.ones((1, 2))).tolist()
        [[-2.0, -2.0]]
    """

    @abstractmethod
    def apply(self, v: Array) -> Array:
        """Return H v for `v` `(batch, n)`."""

    @abstractmethod
    def apply_transpose(self, v: Array) -> Array:
        """Return Hᵀ v for `v` `(batch, n)`."""

    def apply_transpose_unregularised(self, v: Array) -> Array:
        """Return Hᵀ v with as little regularisation as rounding allows, to judge errors with."""
        return self.apply_transpose(v)

    def solve_transpose(self, g: Array) -> Array:
        """Return −Hᵀ g for `g` `(batch, n)`: the estimate's solution of u = g + Jᵀu."""
        return -self.apply_transpose(g)

    def known(self) -> Array | None:
        """Return which samples have secant pairs `(batch,)` of bool; None if all may have some.

        H is −I for the others. A strategy that starts from H starts from zero for them, and reports it.
        """
        return None

    def prepared(self) -> InverseJacobian:
        """Return the same operator, ready to be applied to many vectors: work that all of them share is done here."""
        return self
