"""Solve (I − Jᵀ) u = g to an *estimated error*, not only to a residual."""

from __future__ import annotations

from typing import NamedTuple

from deqcore.backend import Array, Backend, Map
from deqcore.linear.gmres import Krylov, KrylovSpace

SAFETY = 1.2
"""Factor on the error estimate. With it the estimate lay between 0.5 and 13 times the true error in 98 % of 1,000
solves, see "Certified reuse" in docs/design.md."""


class Certified(NamedTuple):
    """The solution and what is known of it. All but `u` `(batch, n)` have shape `(batch,)`."""

    u: Array
    residual: Array  # ‖g + Jᵀu − u‖ / ‖g‖
    error: Array  # estimate of ‖u − u*‖ / ‖u*‖
    pulls: Array  # int32
    met: Array  # bool: both residual and error are at most the target


class _Round(NamedTuple):
    space: Krylov
    goal: Array
    residual: Array
    error: Array
    met: Array


def solve_certified(
    backend: Backend, pull: Map, g: Array, precondition: Map | None, *, target: float, max_pulls: int
) -> Certified:
    """Right-preconditioned GMRES that stops, per sample, when the estimated error meets the target.

    The residual alone does not bound the error: with a slow mode, a residual of 0.2 goes with a cosine of 0.6. The
    error is A^-1 r = M (A M)^-1 r, and the Krylov space knows a lower bound 1/σ_min(H̄) of ‖(A M)^-1‖, which is tight
    once M has taken the slow modes out. So

        error ≈ SAFETY · max(‖r‖, ‖M r‖) / (σ_min(H̄) ‖u‖).

    Rounds: grow the space to a residual goal, estimate, tighten the goal of the samples that are not done.

    Args:
        backend: whose arrays these are.
        pull: `u ↦ Jᵀu`.
        g: cotangent `(batch, n)`.
        precondition: `v ↦ M v`, M ≈ (I − Jᵀ)^-1, or None.
        target: bound on the relative residual and on the estimated relative error.
        max_pulls: products with Jᵀ at most, per sample.
    """
    xp = backend.xp
    space = KrylovSpace(backend, lambda u: u - pull(u), precondition)
    norm = backend.wide(backend.norm(g))
    start = space.begin(g, max_pulls)
    nothing = xp.zeros_like(norm)
    first = _Round(start, target * norm, nothing + 1.0, nothing + float("inf"), norm == 0)

    def unfinished(r: _Round) -> Array:
        return xp.any(~r.met & r.space.alive)

    def once(r: _Round) -> _Round:
        k = space.grow(r.space, r.goal, max_pulls - r.space.grown)
        residual, error = _estimate(backend, space, k, norm)
        met = (residual <= target) & (error <= target) | (norm == 0)
        shrink = xp.clip(0.8 * target / error, 0.1, 0.7)
        goal = xp.where(met, r.goal, xp.minimum(r.goal, k.residual) * xp.where(xp.isnan(shrink), 0.1 + nothing, shrink))
        spent = k.grown >= max_pulls
        k = k._replace(alive=k.alive & ~spent)
        return _Round(k, goal, residual, error, met)

    end = backend.loop(unfinished, once, first, max_pulls, 1)
    return Certified(space.solution(end.space), end.residual, end.error, end.space.steps, end.met)


def _estimate(backend: Backend, space: KrylovSpace, k: Krylov, norm: Array) -> tuple[Array, Array]:
    """Relative residual and estimated relative error of the space's solution."""
    xp = backend.xp
    u = space.solution(k)
    size = backend.wide(backend.norm(u))
    reach = k.residual
    if space.precondition is not None:
        reach = xp.maximum(reach, backend.wide(backend.norm(space.precondition(space.residual_vector(k)))))
    error = SAFETY * reach * space.inverse_norm(k) / xp.where(size > 0, size, xp.ones_like(size))
    error = xp.where(size > 0, error, xp.where(norm > 0, xp.full_like(error, float("inf")), xp.zeros_like(error)))
    return k.residual / xp.where(norm > 0, norm, xp.ones_like(norm)), error
