"""Estimates of the inverse Jacobian H ≈ (∂(f − z)/∂z)^-1 that solvers leave behind.

They are minus the identity plus a correction of low rank, so that H ≈ −I where f is flat. Applying one costs two
passes over its history, whatever f costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.types import Array


@dataclass(frozen=True)
class MultisecantInverse(InverseJacobian):
    """H = −I − Q K Qᵀ with one history Q and small matrices K `(batch, history_size, history_size)`."""

    backend: Backend
    basis: History
    kernel: Array
    sharp: Array | None = None

    def apply(self, v: Array) -> Array:
        """H v = −v − Q K Qᵀ v."""
        return -v - self.basis.combine(matvec(self.backend, self.kernel, self.basis.dot(v)))

    def apply_transpose(self, v: Array) -> Array:
        """Hᵀ v = −v − Q Kᵀ Qᵀ v."""
        return -v - self.basis.combine(vecmat(self.backend, self.basis.dot(v), self.kernel))

    def apply_transpose_unregularised(self, v: Array) -> Array:
        """The same with the other kernel."""
        kernel = self.kernel if self.sharp is None else self.sharp
        return -v - self.basis.combine(vecmat(self.backend, self.basis.dot(v), kernel))


@dataclass(frozen=True)
class BroydenInverse(InverseJacobian):
    """H = −I − Q K Qᵀ with K = Σ_j l_j r_jᵀ kept as its updates. What Broyden leaves.

    K is never formed: its products take O(k) work a vector in place of O(k²), and are those of histories, which do
    not depend on the batch by a single bit (a product of matrices with as many columns as the *batch* took steps did).
    """

    basis: History
    left: History
    right: History

    def apply(self, v: Array) -> Array:
        """H v = −v − Q Σ_j l_j (r_jᵀ Qᵀ v)."""
        return -self.basis.add_combination(v, self.left.combine(self.right.dot(self.basis.dot(v))))

    def apply_transpose(self, v: Array) -> Array:
        """Hᵀ v = −v − Q Σ_j r_j (l_jᵀ Qᵀ v)."""
        return -self.basis.add_combination(v, self.right.combine(self.left.dot(self.basis.dot(v))))


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


RIDGE: Final = 0.3
"""Tikhonov parameter of the multi-secant system of unit pairs. With 1e-10 the estimate as a preconditioner lost to none
at all by up to 43 vjps on conv cells, whose pairs are nearly dependent; from 0.1 to 1 it hardly matters
(docs/notes)."""

SHARP: Final = 1e-4
"""The same where the estimate only judges an error."""


def multisecant(backend: Backend, basis: History, gram: Array, steps: Array, differences: Array) -> MultisecantInverse:
    """The estimate H = −I + (S + Y)(SᵀY)^+ Sᵀ, which satisfies every secant equation H Y = S, in the mean.

    With S = Q Rᵀ and Y = Q Eᵀ in the span of one basis Q everything is small: SᵀY = R N Eᵀ, N = QᵀQ. The system is
    scaled to unit pairs and regularised (Tikhonov), so that pairs near rounding or nearly dependent ones do no harm.

    Used as a right preconditioner M = −Hᵀ of A = (I − J)ᵀ it deflates: Sᵀ(A M) = Sᵀ, so that, but for the
    regularisation, A M has the eigenvalue 1 on all directions that the forward solve has seen. Measured against
    Broyden's own estimate in docs/notes.

    Args:
        backend: whose arrays these are.
        basis: Q.
        gram: N `(batch, m, m)`, in the wide dtype.
        steps: R `(batch, p, m)`, coefficients of each s; zero rows for pairs that are missing.
        differences: E `(batch, p, m)`, coefficients of each y; zero rows likewise.

    Source: Fang & Saad (2009), "Two classes of multisecant methods for nonlinear acceleration", type-I form.
    """
    xp = backend.xp
    flip = (0, 2, 1)
    product = xp.matmul(steps, gram)  # (batch, p, m)
    s = _scale(backend, xp.sum(product * steps, axis=2))
    differences = xp.where((s > 0.0)[:, :, None], differences, xp.zeros_like(differences))  # no step, no pair
    y = _scale(backend, xp.sum(xp.matmul(differences, gram) * differences, axis=2))
    pairs = xp.matmul(product, xp.permute_dims(differences, flip)) * s[:, :, None] * y[:, None, :]
    normal = xp.matmul(xp.permute_dims(pairs, flip), pairs)
    batch, size, _ = normal.shape
    eye = backend.linalg.eye(gram, size)[None]
    left = xp.permute_dims(steps + differences, flip)

    # Both systems in one call: a traced program holds the elimination once. A sample's two systems stand side by side,
    # so that they stay on its device where a batch is split over several.
    systems = xp.stack([normal + RIDGE * eye, normal + SHARP * eye], axis=1)
    sides = xp.stack([xp.permute_dims(pairs, flip)] * 2, axis=1)
    both = backend.linalg.solve_positive(
        xp.reshape(systems, (2 * batch, size, size)), xp.reshape(sides, (2 * batch, size, sides.shape[3]))
    )
    both = xp.reshape(both, (batch, 2, size, both.shape[2]))

    def kernel(inverse: Array) -> Array:
        inverse = inverse * y[:, :, None] * s[:, None, :]
        found = -xp.matmul(xp.matmul(left, inverse), steps)
        sound = xp.all(xp.all(xp.isfinite(found), axis=2), axis=1)
        return xp.where(sound[:, None, None], found, xp.zeros_like(found))

    return MultisecantInverse(backend, basis, kernel(both[:, 0]), kernel(both[:, 1]))


def _scale(backend: Backend, squares: Array) -> Array:
    """1/√squares, zero where a pair is missing."""
    xp = backend.xp
    return 1.0 / xp.sqrt(xp.where(squares > 0, squares, xp.full_like(squares, float("inf"))))


def matvec(backend: Backend, a: Array, x: Array) -> Array:
    """A x for small matrices `(batch, k, k)` and vectors `(batch, k)`; as xᵀAᵀ its bits do not depend on the batch."""
    return vecmat(backend, x, backend.xp.permute_dims(a, (0, 2, 1)))


def vecmat(backend: Backend, x: Array, a: Array) -> Array:
    """Aᵀ x for small matrices `(batch, k, k)` and vectors `(batch, k)`."""
    return backend.xp.matmul(x[:, None, :], a)[:, 0, :]
