"""Estimates of the inverse Jacobian H ≈ (∂(f − z)/∂z)^-1 that solvers leave behind.

They are minus the identity plus a correction of low rank, so that H ≈ −I where f is flat. Applying one costs two
passes over its history, whatever f costs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.kernels import FusedKernels
from deqcore.types import Array


@dataclass(frozen=True)
class MultisecantInverse(InverseJacobian):
    """H = −I + Q L W S Qᵀ with one history Q and small matrices. What `multisecant` makes.

    S and L hold p rows of coefficients of m vectors, the first of Q: those of the steps, and of steps and differences
    together. W = D_y (PᵀP + μ I)^-1 Pᵀ D_s is never formed: one vector costs one solve of p unknowns. An operator for
    many vectors is `prepared`.

    Attributes:
        backend: whose arrays these are.
        basis: Q.
        steps: S `(batch, p, m)`, in the wide dtype.
        sums: the rows of L `(batch, p, m)`.
        pairs: P `(batch, p, p)`.
        normal: PᵀP `(batch, p, p)`.
        scale: the diagonals D_s and D_y, `(batch, p)` each.
        kernel: −L W S `(batch, m, m)` of a prepared operator.
    """

    backend: Backend
    basis: History
    steps: Array
    sums: Array
    pairs: Array
    normal: Array
    scale: tuple[Array, Array]
    kernel: Array | None = None

    def apply(self, v: Array) -> Array:
        """H v = −v + Q L W S Qᵀ v."""
        if not self.steps.shape[1]:
            return -v
        q = self._seen(v)
        if self.kernel is not None:
            return -v - self._combined(matvec(self.backend, self.kernel, q))
        s, y = self.scale
        inner = self._solve(RIDGE, vecmat(self.backend, s * matvec(self.backend, self.steps, q), self.pairs))
        return -v + self._combined(vecmat(self.backend, y * inner, self.sums))

    def apply_transpose(self, v: Array) -> Array:
        """Hᵀ v = −v + Q Sᵀ Wᵀ Lᵀ Qᵀ v."""
        if self.kernel is not None:
            return -v - self._combined(vecmat(self.backend, self._seen(v), self.kernel))
        return self._transposed(v, RIDGE)

    def apply_transpose_unregularised(self, v: Array) -> Array:
        """Return Hᵀv with less regularisation."""
        return self._transposed(v, SHARP)

    def prepared(self) -> MultisecantInverse:
        """Form the kernel: as many solves as there are pairs."""
        if self.kernel is not None or not self.steps.shape[1]:
            return self
        s, y = self.scale
        inverse = y[:, :, None] * self._solve(RIDGE, self.backend.xp.permute_dims(self.pairs, FLIP)) * s[:, None, :]
        kernel = self.backend.xp.matmul(
            self.backend.xp.matmul(self.backend.xp.permute_dims(self.sums, FLIP), inverse), self.steps
        )
        return replace(self, kernel=-self._sound(kernel))

    def _transposed(self, v: Array, ridge: float) -> Array:
        if not self.steps.shape[1]:
            return -v
        s, y = self.scale
        inner = self._solve(ridge, y * matvec(self.backend, self.sums, self._seen(v)))
        return -v + self._combined(vecmat(self.backend, s * matvec(self.backend, self.pairs, inner), self.steps))

    def _solve(self, ridge: float, side: Array) -> Array:
        eye = self.backend.linalg.eye(self.normal, self.normal.shape[1])[None]
        return self.backend.linalg.solve_positive(self.normal + ridge * eye, side)

    def _seen(self, v: Array) -> Array:
        """Qᵀ v, `(batch, m)`."""
        return self.basis.dot(v)[:, : self.steps.shape[2]]

    def _combined(self, coefficients: Array) -> Array:
        """Q c, and zero for a sample whose system is singular."""
        xp = self.backend.xp
        c = self._sound(coefficients)
        missing = self.basis.history_size - c.shape[1]
        nothing = xp.broadcast_to(xp.zeros_like(c[:, :1]), (c.shape[0], missing))
        return self.basis.combine(xp.concat([c, nothing], axis=1) if missing else c)

    def _sound(self, x: Array) -> Array:
        """`x` `(batch, …)`, but zero for a sample that has a number that is not finite."""
        xp = self.backend.xp
        sound = xp.isfinite(x)
        while sound.ndim > 1:  # a reshape cannot tell the length of an empty batch
            sound = xp.all(sound, axis=-1)
        return self.backend.select(sound, x, xp.zeros_like(x))


@dataclass(frozen=True)
class BroydenInverse(InverseJacobian):
    """H = −I − Q K Qᵀ with K = Σ_j l_j r_jᵀ kept as its updates: Broyden's estimate.

    K is never formed: its products take O(k) work a vector instead of O(k²). They are products of histories, whose
    bits do not depend on the batch (a product of matrices with one column per step of the *batch* depended on it).
    """

    basis: History
    left: History
    right: History
    kernels: FusedKernels | None = None

    def apply(self, v: Array) -> Array:
        """H v = −v − Q Σ_j l_j (r_jᵀ Qᵀ v)."""
        return -self._corrected(v, self.right, self.left)

    def apply_transpose(self, v: Array) -> Array:
        """Hᵀ v = −v − Q Σ_j r_j (l_jᵀ Qᵀ v)."""
        return -self.solve_transpose(v)

    def solve_transpose(self, g: Array) -> Array:
        """−Hᵀ g = g + Q Σ_j r_j (l_jᵀ Qᵀ g)."""
        return self._corrected(g, self.left, self.right)

    def _corrected(self, v: Array, left: History, right: History) -> Array:
        fused = None if self.kernels is None else self.kernels.low_rank(self.basis, left, right, v)
        return self.basis.add_combination(v, right.combine(left.dot(self.basis.dot(v)))) if fused is None else fused


@dataclass(frozen=True)
class AndersonInverse(InverseJacobian):
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

    def known(self) -> Array:
        """Return where K is not zero."""
        return self.backend.xp.any(self.backend.xp.any(self.kernel != 0.0, axis=2), axis=1)


FLIP: Final = (0, 2, 1)

RIDGE: Final = 0.3
"""Tikhonov parameter of the multi-secant system of unit pairs. With 1e-10 the estimate as a preconditioner lost to none
at all by up to 43 vjps on conv cells, whose pairs are nearly dependent; from 0.1 to 1 it hardly matters
(docs/notes)."""

SHARP: Final = 1e-4
"""The same where the estimate only judges an error."""


def multisecant(backend: Backend, basis: History, gram: Array, steps: Array, differences: Array) -> MultisecantInverse:
    """Build the estimate H = −I + (S + Y)(SᵀY)^+ Sᵀ, which satisfies all secant equations H Y = S on average.

    With S = Q Rᵀ and Y = Q Eᵀ in the span of one basis Q everything is small: SᵀY = R N Eᵀ, N = QᵀQ. The system is
    scaled to unit pairs and regularised (Tikhonov), so that pairs near rounding or nearly dependent ones do no harm.

    Used as a right preconditioner M = −Hᵀ of A = (I − J)ᵀ it deflates: Sᵀ(A M) = Sᵀ, so that, except for the
    regularisation, A M has the eigenvalue 1 on all directions that the forward solve has seen. Measured against
    Broyden's own estimate in docs/notes.

    Args:
        backend: whose arrays these are.
        basis: Q.
        gram: N `(batch, m, m)` of the first m vectors, in the wide dtype.
        steps: R `(batch, p, m)`, coefficients of each s; zero rows for pairs that are missing.
        differences: E `(batch, p, m)`, coefficients of each y; zero rows for pairs that are missing.

    Source: Fang & Saad (2009), "Two classes of multisecant methods for nonlinear acceleration", type-I form.
    """
    xp = backend.xp
    product = xp.matmul(steps, gram)  # (batch, p, m)
    s = _scale(backend, xp.sum(product * steps, axis=2))
    differences = xp.where((s > 0.0)[:, :, None], differences, xp.zeros_like(differences))  # no step, no pair
    y = _scale(backend, xp.sum(xp.matmul(differences, gram) * differences, axis=2))
    pairs = xp.matmul(product, xp.permute_dims(differences, FLIP)) * s[:, :, None] * y[:, None, :]
    normal = xp.matmul(xp.permute_dims(pairs, FLIP), pairs)
    return MultisecantInverse(backend, basis, steps, steps + differences, pairs, normal, (s, y))


def _scale(backend: Backend, squares: Array) -> Array:
    """1/√squares, zero where a pair is missing."""
    xp = backend.xp
    return 1.0 / xp.sqrt(xp.where(squares > 0, squares, xp.full_like(squares, float("inf"))))


def matvec(backend: Backend, a: Array, x: Array) -> Array:
    """Return A x for small `(batch, k, k)` and `(batch, k)`; as xᵀAᵀ its bits do not depend on the batch."""
    return vecmat(backend, x, backend.xp.permute_dims(a, (0, 2, 1)))


def vecmat(backend: Backend, x: Array, a: Array) -> Array:
    """Aᵀ x for small matrices `(batch, k, k)` and vectors `(batch, k)`."""
    return backend.xp.matmul(x[:, None, :], a)[:, 0, :]
