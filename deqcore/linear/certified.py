"""Solve (I − Jᵀ) u = g to an *estimated error*, not only to a residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.kernels import Krylov
from deqcore.linear.gmres import KrylovSpace
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

WITNESSED = Rule(least=3, spread=1.7, youth=4.0, deepest=5.0, aging=2.0, fall=1.25, rise=0.25, most=2.0)
"""Where M' has a say: the forward solve has met the slow modes that a young space has not."""

ROUNDING = 2.0
"""Residuals below this many roundings of A u are not believed: with A singular the recurrence falls to any size."""

BLURRED = 0.25
"""Share of the target. Where the rounding of A u exceeds it, one vjp measures the residual before the sample counts as
certified: the recurrence cannot see it."""

PASSES = 3
"""Krylov spaces at most: a measured residual that is too large starts the next one."""


JudgeSpace: TypeAlias = Callable[[Krylov, Array], "Array | None"]
"""`(space, rows) ↦ ‖M' r‖` of the residual that the space leaves, `(batch,)`, for the samples in `rows`; or None."""


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
    unverified: Array  # bool: the space can do no more, or is good enough, except for the rounding of A u


class _Look(NamedTuple):
    """What `_Task._look` decides, all of bool."""

    wanted: Array  # the witness is asked
    hopeful: Array  # within the target unless the witness objects
    judged: Array
    reached: Array  # the goal
    blurred: Array  # rounding hides the residual
    spent: Array  # the space can do no more than that
    over: Array  # the budget has run out


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
    judge_space: JudgeSpace | None = None,
) -> Certified:
    """Run GMRES that stops, per sample, when the estimated error meets the target.

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
        judge_space: the same for the residual of a Krylov space, in fewer passes; it may return None.
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
    task = _Task(backend, space, g, norm, judge, judge_space, rule, max_relative_error, max_vjps)
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
    judge_space: JudgeSpace | None
    rule: Rule
    max_relative_error: float
    max_vjps: int

    def one_pass(self, p: _Pass) -> _Pass:
        """Build a Krylov space, and measure what it cannot know."""
        backend, xp = self.backend, self.backend.xp
        k = self.space.begin(p.left, self.max_vjps)
        k = k._replace(can_grow=k.can_grow & p.unfinished)
        before = p.found
        # Nothing has been found before the first space, and no pass shows it.
        again = before.vjps > 0
        size = backend.cond(again, lambda nothing: self._norm(before.u), 0 * self.norm)
        first = _Round(k, p.goal, before.residual, before.error, before.met, self.norm < 0)
        end = backend.loop(
            lambda r: xp.any(r.space.can_grow), lambda r: self._round(p, size, r), first, self.max_vjps, 1
        )
        vjps = before.vjps + end.space.steps
        more = self.space.solution(end.space)
        u = backend.cond(again, lambda more: before.u + more, more)
        found = Certified(u, end.residual, end.error, vjps, end.met)
        doubtful = end.unverified & (vjps < self.max_vjps)
        after = _Pass(found, p.left, p.goal, doubtful)
        return backend.cond(doubtful, lambda q: self._measured(q, self.space.inverse_norm(end.space)), after)

    def _round(self, p: _Pass, before: Array, r: _Round) -> _Round:
        """Let the space grow until a sample reaches its goal, and judge the samples that have."""
        backend, xp = self.backend, self.backend.xp
        young = r.space.dimension < self.rule.least
        bottom = NOTHING_HIDDEN * self.max_relative_error * self.norm
        least = min(self.rule.least, self.max_vjps) + 0 * r.space.dimension
        steps = xp.where(young, least, self.max_vjps) - r.space.dimension
        k = self.space.grow(r.space, xp.where(young, bottom, r.goal), steps, together=True)
        (asked,) = on_host(
            backend, self._asked, r.goal, r.met, r.unverified, p.unfinished, p.found.vjps, k.residual, k.can_grow,
            k.steps,
        )  # fmt: skip
        figures = r.goal, r.residual, r.error, r.met, r.unverified, k.can_grow
        figures = backend.cond(asked, lambda old: self._judged(p, before, k, asked, old), figures)
        return _Round(k._replace(can_grow=figures[5]), *figures[:5])

    def _asked(
        self, xp: Any, goal: Array, met: Array, unverified: Array, unfinished: Array, vjps: Array, left: Array,
        can_grow: Array, steps: Array,
    ) -> tuple[Array, ...]:  # fmt: skip
        """Decide which samples' errors are estimated: those with a small residual, and those that cannot go on."""
        pending = unfinished & ~met & ~unverified
        return (pending & ((left <= goal) | ~can_grow | (vjps + steps >= self.max_vjps)),)

    def _judged(self, p: _Pass, before: Array, k: Krylov, asked: Array, old: tuple[Array, ...]) -> tuple[Array, ...]:
        """Return goal, residual, error, met, unverified and can_grow after the `asked` samples have been judged."""
        goal, last_residual, last_error, met, unverified, can_grow = old
        found = self._estimated(p, before, k, asked)
        look = _Look(
            *on_host(
                self.backend, self._look, found.residual, found.rounding, found.error, goal, met, unverified,
                p.unfinished, p.found.vjps, k.residual, can_grow, k.steps, self.norm,
            )
        )  # fmt: skip
        error = self._witnessed(k, look.wanted, found)
        return on_host(
            self.backend, self._decide, *look, error, found.residual, found.rounding, goal, last_residual, last_error,
            met, unverified, k.residual, can_grow,
        )  # fmt: skip

    def _look(
        self, xp: Any, residual: Array, rounding: Array, error: Array, goal: Array, met: Array, unverified: Array,
        unfinished: Array, vjps: Array, left: Array, can_grow: Array, steps: Array, norm: Array,
    ) -> tuple[Array, ...]:  # fmt: skip
        """Decide which samples are judged; all arrays are `(batch,)`."""
        target = self.max_relative_error
        blurred = rounding > BLURRED * target
        spent = blurred & (left <= rounding * norm)
        over = vjps + steps >= self.max_vjps
        # Only a sample that is there, or can go no further, is judged: when others pause must not matter to it.
        closed = ~can_grow | spent
        known = (steps >= self.rule.least) | (left <= NOTHING_HIDDEN * target * norm) | closed
        reached = known & (left <= goal)
        judged = unfinished & ~met & ~unverified & (reached | closed | over)
        hopeful = judged & known & (residual <= target) & (error <= target)
        return hopeful | (judged & (closed | over)), hopeful, judged, reached, blurred, spent, over

    def _decide(
        self, xp: Any, wanted: Array, hopeful: Array, judged: Array, reached: Array, blurred: Array, spent: Array,
        over: Array, error: Array, residual: Array, rounding: Array, goal: Array, last_residual: Array,
        last_error: Array, met: Array, unverified: Array, left: Array, can_grow: Array,
    ) -> tuple[Array, ...]:  # fmt: skip
        """Decide which of the judged samples have met the target, and the next goals."""
        target = self.max_relative_error
        residual = xp.where(judged, xp.maximum(residual, rounding), last_residual)
        error = xp.where(judged, error, last_error)
        passed = hopeful & (error <= target)
        met = met | (passed & ~blurred)
        unverified = unverified | (judged & blurred & (passed | spent))
        goal = xp.where(reached, left * _tighter(xp, target, error), goal)
        return goal, residual, error, met, unverified, can_grow & ~met & ~unverified & ~over

    def _estimated(self, p: _Pass, before: Array, k: Krylov, asked: Array) -> _Estimates:
        """Estimate residual and error of the solution so far, of size `before`, and the space's together."""
        backend, xp, space = self.backend, self.backend.xp, self.space
        # Elsewhere the inverse has norm 1: what only rounding ends there is measured before it counts.
        found, reach = space.least_squares(k, inverse=asked), k.residual
        # Without M the basis is orthonormal, and no pass is needed; in a later space the sum may be smaller than this.
        size, whole = found.size, xp.abs(before - found.size)
        if space.precondition is not None:
            u = space.solution(k, found)
            size, whole = self._norm(u), self._norm(p.found.u + u)
            reach = xp.maximum(reach, self._norm(space.precondition(space.residual_vector(k))))
        rounding = backend.eps(k.v) * ROUNDING

        def estimated(xp: Any, *parts: Array) -> tuple[Array, ...]:
            return _estimates(xp, self.rule, rounding, *parts)

        steps = backend.cast(k.steps, self.norm)
        parts = size, whole, reach, k.residual, self.norm, steps, *found[2:]
        residual, hidden, error = on_host(backend, estimated, *parts)
        return _Estimates(residual, hidden, error, whole)

    def _witnessed(self, k: Krylov, wanted: Array, found: _Estimates) -> Array:
        """Return the estimated error, raised by what M' says of the residual of the `wanted` samples."""
        judge, xp = self.judge, self.backend.xp
        if judge is None:
            return found.error

        def raised(error: Array) -> Array:
            reach = None if self.judge_space is None else self.judge_space(k, wanted)
            if reach is None:
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
        goal = length * _tighter(xp, target, worse)
        unfinished = p.unfinished & ~met & (vjps < self.max_vjps)
        return _Pass(Certified(found.u, residual, error, vjps, met), left, goal, unfinished)

    def _norm(self, v: Array) -> Array:
        return self.backend.to_accum_dtype(self.backend.norm(v))


def on_host(backend: Backend, decide: Callable[..., tuple[Array, ...]], *figures: Array) -> tuple[Array, ...]:
    """Return `decide(xp, *figures)` for figures `(batch,)`, with NumPy as `xp` where reading them costs no wait."""
    views = [backend.host.numpy_view(figure) for figure in figures]
    if any(view is None for view in views):
        return decide(backend.xp, *figures)
    with np.errstate(all="ignore"):  # figures may be NaN or inf
        return tuple(backend.host.from_numpy_view(found) for found in decide(np, *views))


def _tighter(xp: Any, target: float, error: Array) -> Array:
    """Return the factor on a residual whose estimated error missed the target."""
    return xp.clip(target / error, 0.7, 0.9)


def _estimates(
    xp: Any, rule: Rule, eps: float, size: Array, whole: Array, reach: Array, residual: Array, norm: Array,
    steps: Array, inverse_norm: Array, column_norm: Array, latest: Array, best: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Return the first three of `_Estimates`."""
    rounding = eps * column_norm * size
    age = xp.where(steps > 0, steps, xp.ones_like(steps)) ** rule.aging
    youth = rule.youth * xp.clip(inverse_norm, 1.0, rule.deepest) / age
    slower = xp.clip(latest / best, 1.0, rule.most)
    caution = rule.spread * (1.0 + youth) * latest**rule.fall * slower**rule.rise
    error = xp.maximum(reach, rounding) * inverse_norm * caution / whole
    return residual / norm, rounding / norm, error  # a cotangent of zero is not judged
