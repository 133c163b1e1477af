"""Solve (I − Jᵀ) u = g to an *estimated error*, not only to a residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from deqcore.abc.backend import Backend
from deqcore.linear.gmres import Krylov, KrylovSpace, LeastSquares
from deqcore.types import Array, Map

SAFETY = 1.2
"""Factor on an error that is estimated by one application of an estimate, as plain reuse does."""

NOTHING_HIDDEN = 1e-3
"""Share of the target. A residual below it ends the wait for `Rule.least`: only a mode slower than this could hide."""

JUDGED = 2.5
"""Factor on the estimate by M'."""


@dataclass(frozen=True)
class Rule:
    """How the estimate by the least singular value is raised (docs/notes/certificates.md).

    Attributes:
        least: dimensions of the Krylov space before its estimate counts: one or two have seen nothing of a mode that
            the cotangent shows little of.
        spread: factor on the estimate.
        youth: a space of k dimensions has its estimate raised by 1 + youth · min(1/σ, deepest) / k^aging: σ falls
            until the slow modes have been met, and a space with a slow mode may hide a slower one.
        deepest: most that 1/σ counts there.
        aging: see `youth`.
        fall: exponent of ρ, by which the last step reduced the residual.
        rise: exponent of ρ/ρ', where ρ' is the best ratio of the steps before.
        most: most that ρ/ρ' counts: at rounding level the residual does not fall at all.
    """

    least: int
    spread: float
    youth: float
    deepest: float
    aging: float
    fall: float
    rise: float
    most: float


ALONE = Rule(least=4, spread=1.5, youth=4.0, deepest=3.0, aging=1.0, fall=0.5, rise=2.0, most=8.0)
"""Where the Krylov space is all that is known."""

DEFLATED = Rule(least=3, spread=1.2, youth=2.0, deepest=5.0, aging=1.0, fall=1.0, rise=1.0, most=4.0)
"""With a preconditioner, which has taken the slow modes out that the forward solve has met."""

WITNESSED = Rule(least=3, spread=1.5, youth=4.0, deepest=5.0, aging=2.0, fall=1.25, rise=0.25, most=2.0)
"""Where M' has a say: the forward solve has met the slow modes that a young space has not."""

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


class _Estimates(NamedTuple):
    residual: Array  # relative, by the recurrence
    rounding: Array  # relative residual that rounding may hide
    error: Array  # relative
    size: Array  # ‖u‖


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
    """GMRES that stops, per sample, when the estimated error meets the target.

    The residual alone does not bound the error: with a slow mode, a residual of 0.2 goes with a cosine of 0.6. The
    error is A^-1 r = M (A M)^-1 r, and the Krylov space knows a lower bound 1/σ_min(H̄) of ‖(A M)^-1‖, which is tight
    once the space has met the slow modes, or M has taken them out. The estimate is

        error ≈ max(R max(‖r‖, ‖M r‖) / σ, 2.5 ‖M' r‖) / ‖u‖

    where M' is the forward solve's own estimate of A^-1, with little regularisation: it has met slow modes that a young
    space has not. R is a factor that `Rule` defines: from the dimension, σ and the ratios by which the residual fell. A
    residual that falls slowly, or more slowly than it did, is one of slow modes.

    No sample is certified by fewer than `Rule.least` dimensions unless its space has closed or its residual is tiny.
    Where the rounding of A u exceeds `BLURRED` of the target, one vjp measures the residual, and a new space begins at
    it if it is too large. M' is applied only when another sample may be certified.

    It is an estimate and not a bound: it misses a mode that neither M' nor the space has met. Its comparison with true
    errors, and the alternatives: docs/notes/certificates.md.

    A pass is one Krylov space. It has rounds: grow the space until a sample reaches its residual goal, estimate,
    tighten the goals of the samples that reached theirs and are not done.

    Args:
        backend: whose arrays these are.
        vjp: `u ↦ Jᵀu`.
        g: cotangent `(batch, n)`.
        precondition: `v ↦ M v`, M ≈ (I − Jᵀ)^-1, or None. It costs passes over its history at every vjp.
        max_relative_error: largest relative residual and largest estimated relative error of a certified sample.
        max_vjps: products with Jᵀ at most, per sample.
        judge: `v ↦ ‖M' v‖` of each row `(batch,)`, or None.
    """
    xp = backend.xp
    norm = backend.to_accum_dtype(backend.norm(g))
    nothing = 0 * norm  # NaN where the cotangent is not finite, and so are residual and error then
    residual = xp.where(norm == 0, nothing, nothing + 1.0)
    error = xp.where(residual > 0, nothing + float("inf"), nothing)
    vjps = xp.zeros_like(norm, dtype=xp.int32)
    found = Certified(xp.zeros_like(g), residual, error, vjps, norm == 0)
    space = KrylovSpace(backend, vjp, precondition, shifted=True)
    rule = DEFLATED if precondition is not None else ALONE if judge is None else WITNESSED
    task = _Task(backend, space, g, norm, judge, rule, max_relative_error, max_vjps)
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
    rule: Rule
    max_relative_error: float
    max_vjps: int

    def one_pass(self, p: _Pass) -> _Pass:
        """Build a Krylov space, and measure what it cannot know."""
        backend, xp = self.backend, self.backend.xp
        k = self.space.begin(p.left, self.max_vjps)
        k = k._replace(can_grow=k.can_grow & p.unfinished)
        before = p.found
        size = self._norm(before.u)
        first = _Round(k, p.goal, before.residual, before.error, before.met, self.norm < 0)
        end = backend.loop(lambda r: xp.any(r.space.can_grow), lambda r: self._round(p, size, r), first, self.max_vjps, 1)
        vjps = before.vjps + end.space.steps
        found = Certified(before.u + self.space.solution(end.space), end.residual, end.error, vjps, end.met)
        doubtful = end.unverified & (vjps < self.max_vjps)
        after = _Pass(found, p.left, p.goal, doubtful)
        return backend.cond(doubtful, lambda q: self._measured(q, self.space.inverse_norm(end.space)), after)

    def _round(self, p: _Pass, before: Array, r: _Round) -> _Round:
        """Let the space grow until a sample reaches its goal, and judge the samples that have."""
        xp, target, norm = self.backend.xp, self.max_relative_error, self.norm
        young = r.space.dimension < self.rule.least
        bottom = NOTHING_HIDDEN * target * norm
        least = min(self.rule.least, self.max_vjps) + 0 * r.space.dimension
        steps = xp.where(young, least, self.max_vjps) - r.space.dimension
        k = self.space.grow(r.space, xp.where(young, bottom, r.goal), steps, together=True)
        found = self._estimated(p, before, k)
        blurred = found.rounding > BLURRED * target
        spent = blurred & (k.residual <= found.rounding * norm)
        over = p.found.vjps + k.steps >= self.max_vjps
        # Only a sample that is there, or can go no further, is judged: when others pause must not matter to it.
        closed = ~k.can_grow | spent
        known = (k.steps >= self.rule.least) | (k.residual <= bottom) | closed
        reached = known & (k.residual <= r.goal)
        judged = p.unfinished & ~r.met & ~r.unverified & (reached | closed | over)
        hopeful = judged & known & (found.residual <= target) & (found.error <= target)
        witnessed = self._witnessed(k, hopeful | (judged & (closed | over)), found)
        residual = xp.where(judged, xp.maximum(found.residual, found.rounding), r.residual)
        error = xp.where(judged, witnessed, r.error)
        passed = hopeful & (error <= target)
        met = r.met | (passed & ~blurred)
        unverified = r.unverified | (judged & blurred & (passed | spent))
        goal = xp.where(reached, k.residual * _tighter(self.backend, target, error), r.goal)
        k = k._replace(can_grow=k.can_grow & ~met & ~unverified & ~over)
        return _Round(k, goal, residual, error, met, unverified)

    def _estimated(self, p: _Pass, before: Array, k: Krylov) -> _Estimates:
        """Estimate residual and error of the solution so far, of size `before`, and the space's together."""
        xp, space = self.backend.xp, self.space
        found = space.least_squares(k)
        # Without M the basis is orthonormal, and no pass is needed; in a later space the sum may be smaller than this.
        size, whole = found.size, xp.abs(before - found.size)
        if space.precondition is not None:
            u = space.solution(k, found)
            size, whole = self._norm(u), self._norm(p.found.u + u)
        rounding = ROUNDING * space.trusted(k._replace(residual=0 * k.residual), size, found.column_norm)
        reach = residual = xp.maximum(k.residual, rounding)
        if space.precondition is not None:
            reach = xp.maximum(reach, self._norm(space.precondition(space.residual_vector(k))))
        reach = reach * found.inverse_norm * _caution(self.backend, self.rule, k.steps, found)
        # A cotangent of zero is not judged.
        return _Estimates(k.residual / self.norm, rounding / self.norm, reach / whole, whole)

    def _witnessed(self, k: Krylov, wanted: Array, found: _Estimates) -> Array:
        """The estimated error, raised by what M' says of the residual of the `wanted` samples."""
        judge, xp = self.judge, self.backend.xp
        if judge is None:
            return found.error

        def raised(error: Array) -> Array:
            reach = self.backend.to_accum_dtype(judge(self.space.residual_vector(k, wanted)))
            return xp.where(wanted, xp.maximum(error, JUDGED * reach / found.size), error)

        return self.backend.cond(wanted, raised, found.error)

    def _measured(self, p: _Pass, inverse_norm: Array) -> _Pass:
        """Measure the residual of the unfinished samples by one vjp: rounding hides it from the Krylov space.

        Basis vectors with a share of slow modes make M v large, and the rounding of A (M v) with it.
        """
        xp, found, target = self.backend.xp, p.found, self.max_relative_error
        left = self.g - self.space.apply(found.u)
        length = self._norm(left)
        reach = length * inverse_norm
        if self.judge is not None:
            reach = xp.maximum(reach, JUDGED * self.backend.to_accum_dtype(self.judge(left)))
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
    return backend.xp.clip(target / error, 0.25, 0.9)


def _caution(backend: Backend, rule: Rule, steps: Array, found: LeastSquares) -> Array:
    """How far the residuals of the space say that the estimate by its singular values may be off, `(batch,)`."""
    xp = backend.xp
    age = backend.cast(xp.where(steps > 0, steps, xp.ones_like(steps)), found.size) ** rule.aging
    youth = rule.youth * xp.clip(found.inverse_norm, 1.0, rule.deepest) / age
    slower = xp.clip(found.latest / found.best, 1.0, rule.most)
    return rule.spread * (1.0 + youth) * found.latest**rule.fall * slower**rule.rise
