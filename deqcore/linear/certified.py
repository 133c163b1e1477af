"""Solve (I − Jᵀ) u = g to an *estimated error*, not only to a residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.kernels import ErrorTask, Krylov
from deqcore.linear.figures import Figures
from deqcore.linear.gmres import KrylovSpace, visible
from deqcore.linear.rules import ALONE, DEFLATED, WITNESSED, Rule, estimates, tighter, witnessed
from deqcore.types import Array, Map

SAFETY = 1.2
"""Factor on an error that is estimated by one application of an estimate, as plain reuse does."""

NOTHING_HIDDEN = 1e-3
"""Share of the target. A residual below it ends the wait for `Rule.least`: only a mode slower than this could hide."""

JUDGED = 2.5
"""Factor on the estimate by M' of a residual that was measured."""


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
    length: Array  # its norm
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


class _Known(NamedTuple):
    """What the space says of itself."""

    left: Array  # ‖r‖ by the recurrence
    can_grow: Array
    steps: Array  # its own
    vjps: Array  # of all spaces so far


class _Decided(NamedTuple):
    """The figures of a `_Round`, with `Krylov.can_grow`."""

    goal: Array
    residual: Array
    error: Array
    met: Array
    unverified: Array
    can_grow: Array


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
    other: Array  # see `witnessed`
    size: Array  # ‖u‖


def solve_certified(
    backend: Backend,
    vjp: Map,
    g: Array,
    precondition: Map | None,
    *,
    max_relative_error: float,
    max_vjps: int,
    witness: InverseJacobian | None = None,
) -> Certified:
    """Run GMRES that stops, per sample, when the estimated error meets the target.

    The residual alone does not bound the error: with a slow mode, a residual of 0.2 goes with a cosine of 0.6. The
    error is A^-1 r = M (A M)^-1 r, and the Krylov space knows a lower bound 1/σ_min(H̄) of ‖(A M)^-1‖, which is tight
    once the space has met the slow modes, or M has taken them out. The estimate is

        error ≈ max(R max(‖r‖, ‖M r‖) / σ, 1.8 ‖M' r‖, 2.6 ρ √(ρ/ρ') √(‖r‖/σ ‖M' r‖)) / ‖u‖

    where M' is the forward solve's own estimate of A^-1, with little regularisation: it has met slow modes that a young
    space has not. ρ is the ratio by which the last step reduced the residual, and ρ' the best ratio before. R is a
    factor that `Rule` defines: from the dimension, σ, ρ and ρ/ρ'. A residual that falls slowly, or more slowly than it
    did, is one of slow modes. With M as preconditioner the second factor is 2.5, and there is no third term.

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
        witness: H with M' = −H, applied transposed and without regularisation; or None.
    """
    norm = backend.to_accum_dtype(backend.norm(g))
    space = KrylovSpace(backend, vjp, precondition, shifted=True)
    rule = DEFLATED if precondition is not None else ALONE if witness is None else WITNESSED
    figures = Figures.of(backend, norm)
    norm = figures.read(norm)
    task = _Task(backend, space, figures, g, norm, witness, rule, max_relative_error, max_vjps)
    with figures.errstate():
        found = task.solved()
    u, *known = found
    return Certified(visible(backend, u, figures.given(norm)), *(figures.given(each) for each in known))


@dataclass(frozen=True)
class _Task:
    """The steps of `solve_certified`. All `(batch,)` but those of a `Krylov` are figures."""

    backend: Backend
    space: KrylovSpace
    figures: Figures
    g: Array
    norm: Array
    witness: InverseJacobian | None
    rule: Rule
    max_relative_error: float
    max_vjps: int

    def solved(self) -> Certified:
        """Build Krylov spaces until no sample needs another."""
        xp, norm = self.figures.xp, self.norm
        nothing = 0 * norm  # NaN where the cotangent is not finite, and so are residual and error then
        residual = xp.where(norm == 0, nothing, nothing + 1.0)
        error = xp.where(residual > 0, nothing + float("inf"), nothing)
        vjps = xp.zeros_like(norm, dtype=xp.int32)
        found = Certified(self.backend.xp.zeros_like(self.g), residual, error, vjps, norm == 0)
        first = _Pass(found, self.g, norm, self.max_relative_error * norm, ~found.met)
        return self.backend.loop(lambda p: xp.any(p.unfinished), self.one_pass, first, PASSES, 1).found

    def one_pass(self, p: _Pass) -> _Pass:
        """Build a Krylov space, and measure what it cannot know."""
        f = self.figures
        k = self.space.begin(p.left, self.max_vjps, f.given(p.length))
        k = k._replace(can_grow=f.given(f.read(k.can_grow) & p.unfinished))
        before = p.found
        again = before.vjps > 0  # before the first space there is no solution that a pass could read
        size = f.when(again, lambda nothing: self._norm(before.u), 0 * self.norm)
        first = _Round(k, p.goal, before.residual, before.error, before.met, self.norm < 0)
        end, u = self._fused(first, before.vjps, size) or self._rounds(p, size, first)
        vjps = before.vjps + f.read(end.space.steps)
        u = f.when(again, lambda more: before.u + more, u)
        found = Certified(u, end.residual, end.error, vjps, end.met)
        doubtful = end.unverified & (vjps < self.max_vjps)
        after = _Pass(found, p.left, p.length, p.goal, doubtful)
        return f.when(doubtful, lambda q: self._measured(q, f.read(self.space.inverse_norm(end.space))), after)

    def _fused(self, r: _Round, vjps: Array, size: Array) -> tuple[_Round, Array] | None:
        """Let a fused kernel do the rounds, if there is one for these arrays."""
        kernels, f, space = self.backend.kernels, self.figures, self.space
        if kernels is None or space.precondition is not None or not f.on_host:
            return None
        rounding = ROUNDING * float(self.backend.eps(self.g))
        asked = (self.norm, r.goal, vjps, size, r.residual, r.error, r.met)
        target = self.max_relative_error
        task = ErrorTask(self.rule, target, self.max_vjps, rounding, self.witness, *(f.given(each) for each in asked))
        judged = kernels.certify(r.space, space.product, task)
        if judged is None:
            return None
        figures = (f.read(each) for each in judged[2:])
        return _Round(judged.space, r.goal, *figures), judged.x

    def _rounds(self, p: _Pass, size: Array, first: _Round) -> tuple[_Round, Array]:
        """Let the space grow until no sample needs it."""
        f, xp = self.figures, self.figures.xp
        end = self.backend.loop(
            lambda r: xp.any(f.read(r.space.can_grow)), lambda r: self._round(p, size, r), first, self.max_vjps, 1
        )
        return end, self.space.solution(end.space)

    def _round(self, p: _Pass, before: Array, r: _Round) -> _Round:
        """Let the space grow until a sample reaches its goal, and judge the samples that have."""
        f, xp = self.figures, self.figures.xp
        dimension = f.read(r.space.dimension)
        young = dimension < self.rule.least
        bottom = NOTHING_HIDDEN * self.max_relative_error * self.norm
        steps = xp.where(young, min(self.rule.least, self.max_vjps) + 0 * dimension, self.max_vjps) - dimension
        k = self.space.grow(r.space, f.given(xp.where(young, bottom, r.goal)), steps, together=True)
        known = _Known(f.read(k.residual), f.read(k.can_grow), f.read(k.steps), p.found.vjps + f.read(k.steps))
        # The error is estimated for a small residual, and where the space is complete or the budget spent.
        small = (known.left <= r.goal) | ~known.can_grow | (known.vjps >= self.max_vjps)
        asked = p.unfinished & ~r.met & ~r.unverified & small
        decided = _Decided(r.goal, r.residual, r.error, r.met, r.unverified, known.can_grow)
        decided = f.when(asked, lambda old: self._judged(p, before, k, known, asked, old), decided)
        return _Round(k._replace(can_grow=f.given(decided.can_grow)), *decided[:5])

    def _judged(self, p: _Pass, before: Array, k: Krylov, known: _Known, asked: Array, old: _Decided) -> _Decided:
        """Decide for the `asked` samples."""
        found = self._estimated(p, before, k, known, asked)
        look = self._look(known, found, asked, old)
        return self._decide(look, known, found, self._witnessed(k, look.wanted, found), old)

    def _look(self, known: _Known, found: _Estimates, asked: Array, old: _Decided) -> _Look:
        """Decide which of the `asked` samples are judged."""
        target, left = self.max_relative_error, known.left
        blurred = found.rounding > BLURRED * target
        spent = blurred & (left <= found.rounding * self.norm)
        over = known.vjps >= self.max_vjps
        # Only a sample that is there, or can go no further, is judged: when others pause must not matter to it.
        closed = ~known.can_grow | spent
        old_enough = (known.steps >= self.rule.least) | (left <= NOTHING_HIDDEN * target * self.norm) | closed
        reached = old_enough & (left <= old.goal)
        judged = asked & (reached | closed | over)
        hopeful = judged & old_enough & (found.residual <= target) & (found.error <= target)
        wanted = hopeful | (judged & (closed | over))
        return _Look(wanted, hopeful, judged, reached, blurred, spent, over)

    def _decide(self, look: _Look, known: _Known, found: _Estimates, error: Array, old: _Decided) -> _Decided:
        """Decide which of the judged samples have met the target, and the next goals."""
        xp, target, judged = self.figures.xp, self.max_relative_error, look.judged
        residual = xp.where(judged, xp.maximum(found.residual, found.rounding), old.residual)
        error = xp.where(judged, error, old.error)
        passed = look.hopeful & (error <= target)
        met = old.met | (passed & ~look.blurred)
        unverified = old.unverified | (judged & look.blurred & (passed | look.spent))
        goal = xp.where(look.reached, known.left * tighter(xp, target, error), old.goal)
        return _Decided(goal, residual, error, met, unverified, known.can_grow & ~met & ~unverified & ~look.over)

    def _estimated(self, p: _Pass, before: Array, k: Krylov, known: _Known, asked: Array) -> _Estimates:
        """Estimate residual and error of the solution so far, of size `before`, and the space's together."""
        f, xp, space = self.figures, self.figures.xp, self.space
        found = space.least_squares(k, inverse=f.given(asked))
        size, *small = (f.read(each) for each in found[1:])
        # Without M the basis is orthonormal, and no pass is needed; in a later space the sum may be smaller than this.
        reach, whole = known.left, xp.abs(before - size)
        if space.precondition is not None:
            u = space.solution(k, found)
            size, whole = self._norm(u), self._norm(p.found.u + u)
            reach = xp.maximum(reach, self._norm(space.precondition(space.residual_vector(k))))
        steps = xp.astype(known.steps, self.norm.dtype)
        rounding = self.backend.eps(k.v) * ROUNDING
        figures = estimates(xp, self.rule, rounding, size, whole, reach, known.left, self.norm, steps, *small)
        return _Estimates(*figures, whole)

    def _witnessed(self, k: Krylov, wanted: Array, found: _Estimates) -> Array:
        """Return the estimated error, raised by what M' says of the residual of the `wanted` samples."""
        f = self.figures
        if self.witness is None:
            return found.error

        def raised(error: Array) -> Array:
            reach = self._reach(self.space.residual_vector(k, f.given(wanted)))
            return f.xp.where(wanted, witnessed(f.xp, self.rule, error, found.other, reach / found.size), error)

        return f.when(wanted, raised, found.error)

    def _measured(self, p: _Pass, inverse_norm: Array) -> _Pass:
        """Measure the residual of the unfinished samples by one vjp: rounding hides it from the Krylov space.

        Basis vectors with a share of slow modes make M v large, and the rounding of A (M v) with it.
        """
        xp, found, target = self.figures.xp, p.found, self.max_relative_error
        left = self.g - self.space.apply(found.u)
        length = self._norm(left)
        reach = length * inverse_norm
        if self.witness is not None:
            reach = xp.maximum(reach, JUDGED * self._reach(left))
        size = self._norm(found.u)
        # A singular A lets u grow until rounding hides g: what is measured there may be small by chance.
        residual = xp.maximum(length, self.backend.eps(found.u) * size) / self.norm
        residual = xp.where(p.unfinished, residual, found.residual)
        error = xp.where(p.unfinished, reach / size, found.error)
        met = found.met | (p.unfinished & (residual <= target) & (error <= target))
        vjps = found.vjps + xp.astype(p.unfinished, xp.int32)
        worse = xp.maximum(error, residual)
        goal = length * tighter(xp, target, worse)
        unfinished = p.unfinished & ~met & (vjps < self.max_vjps)
        return _Pass(Certified(found.u, residual, error, vjps, met), left, length, goal, unfinished)

    def _norm(self, v: Array) -> Array:
        return self.figures.read(self.backend.to_accum_dtype(self.backend.norm(v)))

    def _reach(self, r: Array) -> Array:
        """‖M' r‖."""
        assert self.witness is not None
        return self._norm(self.witness.apply_transpose_unregularised(r))
