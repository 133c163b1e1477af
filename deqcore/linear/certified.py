"""Solve (I − Jᵀ) u = g to an *estimated error*, not only to a residual."""

from __future__ import annotations

from typing import NamedTuple

from deqcore.abc.backend import Backend
from deqcore.linear.gmres import Krylov, KrylovSpace
from deqcore.types import Array, Map

SAFETY = 1.2
"""Factor on an error that is estimated by one application of an estimate, as plain reuse does."""

LEAST = 3
"""Dimensions of the Krylov space before its estimate counts: one or two have seen nothing of a mode that the cotangent
shows little of (docs/notes/certificates.md)."""

NOTHING_HIDDEN = 1e-3
"""Share of the target. A residual below it ends the wait for `LEAST`: only a mode slower than this could hide in it."""

SPREAD = 1.75
"""Factor on the estimate by the least singular value."""

YOUTH = 2.0
"""A space of k dimensions has its estimate raised by 1 + YOUTH / k: σ falls until the slow modes have been seen."""

RISE = 4.0
"""Most that a slower fall of the residual counts: at rounding level it does not fall at all."""

JUDGED = 1.5
"""Factor on the estimate by M'."""

ROUNDING = 2.0
"""Residuals below this many roundings of A u are not believed: with A singular the recurrence falls to any size."""


class Certified(NamedTuple):
    """The solution and what is known of it. All but `u` `(batch, n)` have shape `(batch,)`."""

    u: Array
    residual: Array  # ‖g + Jᵀu − u‖ / ‖g‖
    error: Array  # estimate of ‖u − u*‖ / ‖u*‖
    vjps: Array  # int32
    met: Array  # bool: both residual and error are at most the target


class _Round(NamedTuple):
    space: Krylov
    goal: Array
    residual: Array
    error: Array
    met: Array


def solve_certified(
    backend: Backend,
    vjp: Map,
    g: Array,
    precondition: Map | None,
    *,
    max_relative_error: float,
    max_vjps: int,
    judge: Map | None = None,
) -> Certified:
    """Right-preconditioned GMRES that stops, per sample, when the estimated error meets the target.

    The residual alone does not bound the error: with a slow mode, a residual of 0.2 goes with a cosine of 0.6. The
    error is A^-1 r = M (A M)^-1 r, and the Krylov space knows a lower bound 1/σ_min(H̄) of ‖(A M)^-1‖, which is tight
    once M has taken the slow modes out, or the space has met them. The estimate is

        error ≈ max(1.75 (1 + 2/k) ρ √(ρ/ρ') max(‖r‖, ‖M r‖) / σ_min(H̄), 1.5 ‖M' r‖) / ‖u‖

    where k is the dimension, ρ the ratio by which the last step reduced the residual, ρ' the best ratio of the steps
    before it (ρ / 4 at least, ρ at most), and M' is M with less regularisation, good to judge by and too noisy to
    solve with. A residual that falls slowly, or more slowly than it did, is one of slow modes. No sample is certified
    by fewer than `LEAST` dimensions unless its space has closed or its residual is tiny.

    It is an estimate and no bound: a mode that neither M nor the space has met is not in it. How it compares with true
    errors, and what else was tried: docs/notes/certificates.md.

    Rounds: grow the spaces until a sample reaches its residual goal, estimate, tighten the goals of the samples that
    reached theirs and are not done.

    Args:
        backend: whose arrays these are.
        vjp: `u ↦ Jᵀu`.
        g: cotangent `(batch, n)`.
        precondition: `v ↦ M v`, M ≈ (I − Jᵀ)^-1, or None.
        target: bound on the relative residual and on the estimated relative error.
        max_vjps: products with Jᵀ at most, per sample.
        judge: `v ↦ M' v`, or None.
    """
    xp = backend.xp
    space = KrylovSpace(backend, lambda u: u - vjp(u), precondition)
    norm = backend.to_accum_dtype(backend.norm(g))
    start = space.begin(g, max_vjps)
    nothing = 0 * norm  # NaN where the cotangent is not finite, and so are residual and error then
    some = xp.where(norm == 0, nothing, nothing + 1.0)
    first = _Round(
        start, max_relative_error * norm, some, xp.where(some > 0, nothing + float("inf"), nothing), norm == 0
    )

    def unfinished(r: _Round) -> Array:
        return xp.any(r.space.can_grow)

    def once(r: _Round) -> _Round:
        young = r.space.dimension < LEAST
        bottom = NOTHING_HIDDEN * max_relative_error * norm
        steps = xp.where(young, min(LEAST, max_vjps) + 0 * r.space.dimension, max_vjps) - r.space.dimension
        k = space.grow(r.space, xp.where(young, bottom, r.goal), steps, together=True)
        residual, error = _estimate(backend, space, k, norm, judge)
        # Only a sample that is there, or can go no further, is judged: when others pause must not matter to it.
        closed = ~k.can_grow
        known = (k.steps >= LEAST) | (k.residual <= bottom) | closed
        reached = known & (k.residual <= r.goal)
        judged = ~r.met & (reached | closed | (k.steps >= max_vjps))
        residual, error = xp.where(judged, residual, r.residual), xp.where(judged, error, r.error)
        met = xp.where(judged, known & (residual <= max_relative_error) & (error <= max_relative_error), r.met)
        goal = xp.where(reached, k.residual * xp.clip(max_relative_error / error, 0.25, 0.8), r.goal)
        k = k._replace(can_grow=k.can_grow & ~met & (k.steps < max_vjps))
        return _Round(k, goal, residual, error, met)

    end = backend.loop(unfinished, once, first, max_vjps, 1)
    return Certified(space.solution(end.space), end.residual, end.error, end.space.steps, end.met)


def _estimate(backend: Backend, space: KrylovSpace, k: Krylov, norm: Array, judge: Map | None) -> tuple[Array, Array]:
    """Relative residual and estimated relative error of the space's solution."""
    xp = backend.xp
    u = space.solution(k)
    size = backend.to_accum_dtype(backend.norm(u))
    left = space.residual_vector(k)

    def length(linear: Map) -> Array:
        return backend.to_accum_dtype(backend.norm(linear(left)))

    rounding = space.trusted(k._replace(residual=0 * k.residual), u)
    residual = xp.maximum(k.residual, ROUNDING * rounding)
    reach = residual if space.precondition is None else xp.maximum(residual, length(space.precondition))
    reach = SPREAD * reach * space.inverse_norm(k) * _caution(space, k)
    if judge is not None:
        reach = xp.maximum(reach, JUDGED * length(judge))
    return residual / norm, reach / size  # a cotangent of zero is not judged


def _caution(space: KrylovSpace, k: Krylov) -> Array:
    """How far the residuals of the space say that the estimate by its singular values may be off, `(batch,)`."""
    xp = space.backend.xp
    ratio, last, count = space.ratios(k)
    if ratio.shape[1] == 0:  # no sample has grown its space: all cotangents are zero, or not finite
        return xp.ones_like(count)
    latest = xp.min(xp.where(last, ratio, xp.ones_like(ratio)), axis=1)
    best = xp.min(xp.where(last, xp.ones_like(ratio), ratio), axis=1)
    rise = xp.clip(latest / best, 1.0, RISE)
    return (1.0 + YOUTH / xp.where(count > 0, count, 1.0)) * latest * xp.sqrt(rise)
