"""Solve (I − Jᵀ) u = g to an *estimated error*, not only to a residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.kernels import Krylov
from deqcore.linear.gmres import KrylovSpace
from deqcore.types import Array, Map

SAFETY = 1.2
"""Factor on an error that is estimated by one application of an estimate, as plain reuse does."""

LEAST = 3
"""Dimensions of the Krylov space before its estimate counts: one or two have seen nothing of a mode that the cotangent
shows little of (docs/notes/certificates.md)."""

NOTHING_HIDDEN = 1e-3
"""Share of the target. A residual below it ends the wait for `LEAST`: only a mode slower than this could hide in it."""

SPREAD = 1.2
"""Factor on the estimate by the least singular value."""

YOUTH = 2.0
"""A space of k dimensions has its estimate raised by 1 + YOUTH / (k σ): σ falls until the slow modes have been met."""

DEEPEST = 5.0
"""Most that 1/σ counts there. A space with a slow mode may hide a slower one; a large 1/σ does not make it likelier."""

RISE = 4.0
"""Most that a slower fall of the residual counts: at rounding level it does not fall at all."""

SECOND_LOOK = 4
"""A space of at most this many dimensions whose residual is not below `CLOSE` of the target must pass once more, one
dimension later: the residual falls fast while the fast modes leave it, and stops at the slow ones."""

CLOSE = 0.5
"""Share of the target."""

JUDGED = 1.5
"""Factor on the estimate by M'."""

ROUNDING = 2.0
"""Residuals below this many roundings of A u are not believed: with A singular the recurrence falls to any size."""

BLURRED = 0.25
"""Share of the target. Where the rounding of A u exceeds it, one vjp measures the residual before the sample counts as
certified: the recurrence cannot see it."""

PASSES = 3
"""Krylov spaces at most: a measured residual that is too large starts the next one."""


class Certified(NamedTuple):
    """The solution and what is known of it. All but `u` `(batch, n)` have shape `(batch,)`."""

    u: Array
    residual: Array  # ‖g + Jᵀu − u‖ / ‖g‖
    error: Array  # estimate of ‖u − u*‖ / ‖u*‖
    vjps: Array  # int32
    met: Array  # bool: both residual and error are at most the target


class _Pass(NamedTuple):
    """What is known between two Krylov spaces."""

    found: Certified
    left: Array  # residual vector, where the next space begins (batch, n)
    goal: Array  # of its residual
    unfinished: Array  # bool


class _Round(NamedTuple):
    """What is known after the space has grown."""

    space: Krylov
    goal: Array
    residual: Array
    error: Array
    met: Array
    unverified: Array  # bool: the space can do no more, or is good enough, but for the rounding of A u
    looking: Array  # bool: within the target, and to be so once more


class _Estimates(NamedTuple):
    residual: Array  # relative, by the recurrence
    rounding: Array  # relative residual that rounding may hide
    error: Array  # relative


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

        error ≈ max(1.2 (1 + 2 min(1/σ, 5)/k) ρ (ρ/ρ') max(‖r‖, ‖M r‖) / σ, 1.5 ‖M' r‖) / ‖u‖

    where σ = σ_min(H̄), k is the dimension, ρ the ratio by which the last step reduced the residual, ρ' the best ratio
    of the steps before it (ρ / 4 at least, ρ at most), and M' is M with less regularisation, good to judge by and too
    noisy to solve with. A residual that falls slowly, or more slowly than it did, is one of slow modes.

    No sample is certified by fewer than `LEAST` dimensions unless its space has closed or its residual is tiny. Up to
    `SECOND_LOOK` dimensions a sample must pass twice unless its residual is small. Where the rounding of A u exceeds
    `BLURRED` of the target, one vjp measures the residual, and a new space begins at it if it is too large.

    It is an estimate and not a bound: it misses a mode that neither M nor the space has met. Its comparison with true
    errors, and the alternatives: docs/notes/certificates.md.

    A pass is one Krylov space. It has rounds: grow the space until a sample reaches its residual goal, estimate,
    tighten the goals of the samples that reached theirs and are not done.

    Args:
        backend: whose arrays these are.
        vjp: `u ↦ Jᵀu`.
        g: cotangent `(batch, n)`.
        precondition: `v ↦ M v`, M ≈ (I − Jᵀ)^-1, or None.
        max_relative_error: largest relative residual and largest estimated relative error of a certified sample.
        max_vjps: products with Jᵀ at most, per sample.
        judge: `v ↦ M' v`, or None.
    """
    xp = backend.xp
    norm = backend.to_accum_dtype(backend.norm(g))
    nothing = 0 * norm  # NaN where the cotangent is not finite, and so are residual and error then
    residual = xp.where(norm == 0, nothing, nothing + 1.0)
    error = xp.where(residual > 0, nothing + float("inf"), nothing)
    vjps = xp.zeros_like(norm, dtype=xp.int32)
    found = Certified(xp.zeros_like(g), residual, error, vjps, norm == 0)
    space = KrylovSpace(backend, lambda u: u - vjp(u), precondition)
    task = _Task(backend, space, g, norm, judge, max_relative_error, max_vjps)
    first = _Pass(found, g, max_relative_error * norm, ~found.met)
    return backend.loop(lambda p: xp.any(p.unfinished), task.one_pass, first, PASSES, 1).found


@dataclass(frozen=True)
class _Task:
    """The steps of `solve_certified`."""

    backend: Backend
    space: KrylovSpace
    g: Array
    norm: Array
    judge: Map | None
    max_relative_error: float
    max_vjps: int

    def one_pass(self, p: _Pass) -> _Pass:
        """Build a Krylov space, and measure what it cannot know."""
        backend, xp = self.backend, self.backend.xp
        k = self.space.begin(p.left, self.max_vjps)
        k = k._replace(can_grow=k.can_grow & p.unfinished)
        before = p.found
        first = _Round(k, p.goal, before.residual, before.error, before.met, self.norm < 0, self.norm < 0)
        end = backend.loop(lambda r: xp.any(r.space.can_grow), lambda r: self._round(p, r), first, self.max_vjps, 1)
        vjps = before.vjps + end.space.steps
        found = Certified(before.u + self.space.solution(end.space), end.residual, end.error, vjps, end.met)
        doubtful = end.unverified & (vjps < self.max_vjps)
        after = _Pass(found, p.left, p.goal, doubtful)
        return backend.cond(doubtful, lambda q: self._measured(q, self.space.inverse_norm(end.space)), after)

    def _round(self, p: _Pass, r: _Round) -> _Round:
        """Let the space grow until a sample reaches its goal, and judge the samples that have."""
        xp, target, norm = self.backend.xp, self.max_relative_error, self.norm
        young = r.space.dimension < LEAST
        bottom = NOTHING_HIDDEN * target * norm
        least = min(LEAST, self.max_vjps) + 0 * r.space.dimension
        steps = xp.where(xp.any(r.looking), 1, xp.where(young, least, self.max_vjps) - r.space.dimension)
        goal = xp.where(young, bottom, xp.where(r.looking, 0 * bottom, r.goal))
        k = self.space.grow(r.space, goal, steps, together=True)
        estimates = _estimate(self.backend, self.space, k, p.found.u, norm, self.judge)
        blurred = estimates.rounding > BLURRED * target
        spent = blurred & (k.residual <= estimates.rounding * norm)
        over = p.found.vjps + k.steps >= self.max_vjps
        # Only a sample that is there, or can go no further, is judged: when others pause must not matter to it.
        closed = ~k.can_grow | spent
        known = (k.steps >= LEAST) | (k.residual <= bottom) | closed
        reached = known & ((k.residual <= r.goal) | r.looking)
        judged = p.unfinished & ~r.met & ~r.unverified & (reached | closed | over)
        residual = xp.where(judged, xp.maximum(estimates.residual, estimates.rounding), r.residual)
        error = xp.where(judged, estimates.error, r.error)
        passed = judged & known & (estimates.residual <= target) & (error <= target)
        early = (k.steps <= SECOND_LOOK) & (estimates.residual > CLOSE * target)
        looking = passed & ~blurred & early & ~r.looking & ~closed & ~over
        met = r.met | (passed & ~blurred & ~looking)
        unverified = r.unverified | (judged & blurred & (passed | spent))
        goal = xp.where(reached, k.residual * _tighter(self.backend, target, error), r.goal)
        k = k._replace(can_grow=k.can_grow & ~met & ~unverified & ~over)
        return _Round(k, goal, residual, error, met, unverified, looking)

    def _measured(self, p: _Pass, inverse_norm: Array) -> _Pass:
        """Measure the residual of the unfinished samples by one vjp: rounding hides it from the Krylov space.

        Basis vectors with a share of slow modes make M v large, and the rounding of A (M v) with it.
        """
        xp, found, target = self.backend.xp, p.found, self.max_relative_error
        left = self.g - self.space.product(found.u)
        length = self._norm(left)
        reach = length * inverse_norm
        if self.judge is not None:
            reach = xp.maximum(reach, JUDGED * self._norm(self.judge(left)))
        residual = xp.where(p.unfinished, length / self.norm, found.residual)
        error = xp.where(p.unfinished, reach / self._norm(found.u), found.error)
        met = found.met | (p.unfinished & (residual <= target) & (error <= target))
        vjps = found.vjps + xp.astype(p.unfinished, xp.int32)
        worse = xp.maximum(error, residual)
        goal = length * _tighter(self.backend, target, worse)
        unfinished = p.unfinished & ~met & (vjps < self.max_vjps)
        return _Pass(Certified(found.u, residual, error, vjps, met), left, goal, unfinished)

    def _norm(self, v: Array) -> Array:
        return self.backend.to_accum_dtype(self.backend.norm(v))


def _tighter(backend: Backend, target: float, error: Array) -> Array:
    """The factor on a residual whose estimated error missed the target."""
    return backend.xp.clip(target / error, 0.25, 0.8)


def _estimate(
    backend: Backend, space: KrylovSpace, k: Krylov, before: Array, norm: Array, judge: Map | None
) -> _Estimates:
    """Estimate residual and error of `before` and the space's solution together."""
    xp = backend.xp
    u = space.solution(k)
    size = backend.to_accum_dtype(backend.norm(before + u))
    left = space.residual_vector(k)

    def length(linear: Map) -> Array:
        return backend.to_accum_dtype(backend.norm(linear(left)))

    rounding = ROUNDING * space.trusted(k._replace(residual=0 * k.residual), u)
    residual = xp.maximum(k.residual, rounding)
    reach = residual if space.precondition is None else xp.maximum(residual, length(space.precondition))
    inverse_norm = space.inverse_norm(k)
    reach = SPREAD * reach * inverse_norm * _caution(space, k, inverse_norm)
    if judge is not None:
        reach = xp.maximum(reach, JUDGED * length(judge))
    return _Estimates(k.residual / norm, rounding / norm, reach / size)  # a cotangent of zero is not judged


def _caution(space: KrylovSpace, k: Krylov, inverse_norm: Array) -> Array:
    """How far the residuals of the space say that the estimate by its singular values may be off, `(batch,)`."""
    xp = space.backend.xp
    ratio, last, count = space.ratios(k)
    if ratio.shape[1] == 0:  # no sample has grown its space: all cotangents are zero, or not finite
        return xp.ones_like(count)
    latest = xp.min(xp.where(last, ratio, xp.ones_like(ratio)), axis=1)
    best = xp.min(xp.where(last, xp.ones_like(ratio), ratio), axis=1)
    youth = YOUTH * xp.clip(inverse_norm, 1.0, DEEPEST) / xp.where(count > 0, count, 1.0)
    return (1.0 + youth) * latest * xp.clip(latest / best, 1.0, RISE)
