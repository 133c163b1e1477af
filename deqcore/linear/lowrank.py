"""Estimates of the inverse Jacobian H ≈ (∂(f − z)/∂z)^-1 that solvers leave behind.

They are minus the identity plus a correction of low rank, so that H ≈ −I where f is flat. Applying one costs two
passes over its history, whatever f costs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from deqcore.backend import Array, Backend, History


class InverseJacobian(ABC):
    """H ≈ (∂(f − z)/∂z)^-1 per sample, as a linear operator on `(batch, n)`."""

    @abstractmethod
    def apply(self, v: Array) -> Array:
        """H v for `v` `(batch, n)`."""

    @abstractmethod
    def apply_transpose(self, v: Array) -> Array:
        """Hᵀ v for `v` `(batch, n)`."""


@dataclass(frozen=True)
class OneBasis(InverseJacobian):
    """H = −I − Q K Qᵀ with one history Q and small matrices K `(batch, memory, memory)`. What Broyden leaves."""

    backend: Backend
    basis: History
    kernel: Array

    def apply(self, v: Array) -> Array:
        """H v = −v − Q K Qᵀ v."""
        return -v - self.basis.combine(matvec(self.backend, self.kernel, self.basis.dot(v)))

    def apply_transpose(self, v: Array) -> Array:
        """Hᵀ v = −v − Q Kᵀ Qᵀ v."""
        return -v - self.basis.combine(vecmat(self.backend, self.basis.dot(v), self.kernel))


@dataclass(frozen=True)
class TwoBases(InverseJacobian):
    """H = −I + P K Qᵀ with histories P, Q and small matrices K. What Anderson's differences make."""

    backend: Backend
    left: History
    right: History
    kernel: Array

    def apply(self, v: Array) -> Array:
        """H v = −v + P K Qᵀ v."""
        return -v + self.left.combine(matvec(self.backend, self.kernel, self.right.dot(v)))

    def apply_transpose(self, v: Array) -> Array:
        """Hᵀ v = −v + Q Kᵀ Pᵀ v."""
        return -v + self.right.combine(vecmat(self.backend, self.left.dot(v), self.kernel))


def matvec(backend: Backend, a: Array, x: Array) -> Array:
    """A x for small matrices `(batch, k, k)` and vectors `(batch, k)`."""
    return backend.xp.matmul(a, x[:, :, None])[:, :, 0]


def vecmat(backend: Backend, x: Array, a: Array) -> Array:
    """Aᵀ x for small matrices `(batch, k, k)` and vectors `(batch, k)`."""
    return backend.xp.matmul(x[:, None, :], a)[:, 0, :]
