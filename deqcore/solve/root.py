"""Root finding by the fixed-point machinery: g(z) = 0 is z = z − s g(z), with a factor s per sample.

The factor has the sign and the size of one Newton step along g: with d = G g(z0) for the Jacobian G of g at z0, it is
s = ⟨g, d⟩ / ⟨d, d⟩, so that z − s g has a residual in the units of z. The gradient does not depend on s, because
(I − J)⁻¹ s = G⁻¹ for J = I − s G.

The slope at z0 also decides what a residual means. Where g is much flatter at the solution, as exp(z) − 2 is from 14,
the factor is too small, and the tolerance is met far from the root. So the slope along the same direction is measured
once more where the solve has ended. A sample that does not meet the tolerance by it continues with the new factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.backward import StepStrategy
from deqcore.errors import BackendError, ConfigError, ProblemError
from deqcore.solution import Solution, SolveState
from deqcore.solve.flatten import FlatFunction
from deqcore.solve.leaves import moved
from deqcore.solve.loop import BoundSolve
from deqcore.solve.plan import Plan
from deqcore.solve.report import report_failure, report_nondeterminism
from deqcore.solve.termination import greater
from deqcore.types import Array, BackwardRecord, Map, SolveResult, Status, StoppingCriteria, Tree

ALIGNED: Final = 1e-3  # cosine of g and G g below which their product does not give the sign
NEAR_ZERO: Final = 1e-3  # part of ‖z0‖ for which ‖z‖ counts at least in the tolerance by the new factor
FLATTER: Final = 2.0  # growth of the factor, and excess over the tolerance by it, that are ignored
ROUNDS: Final = 12  # solves with a new factor, at most


def solve(plan: Plan, g: Callable[..., Tree], z0: Tree, args: tuple[Any, ...], state: SolveState | None) -> Solution:
    """Return the solution of g(z, *args) = 0, with the residual ‖g‖ and `fz` = g(z)."""
    if plan.forward.compact:
        raise ConfigError(
            "root: forward.compact must be false, because the factor of each sample belongs to the whole batch (got "
            "true). Set forward.compact = false."
        )
    problem = _Equations(plan, g, args)
    start = plan.space.ravel(z0)
    along, factor = problem.probe(start)
    xp = plan.backend.xp
    run = problem.bound(xp.where(xp.isnan(factor), xp.ones_like(factor), factor))
    value, forward, record = run.plan.run(run.raveled, start, args, state)
    end = problem.judged(run, forward, _First(along, plan.backend.norm(plan.backend.detach(start))))
    if end is not None:
        run, forward, value, record = problem.attached(*end, value, record)
    forward = forward._replace(residual=forward.residual / xp.abs(run.factor))
    solution = run.plan.solution(value, forward, record)
    if solution.fz is not None:
        solution = replace(solution, fz=_equations(plan, forward, run.factor))
    if plan.observed is not None:
        plan.observed(solution, 0.0, run.f, z0, args)
    report_nondeterminism(run.plan, run.raveled, args, forward, record)
    report_failure(run.plan, run.raveled, forward)
    return solution


@dataclass(frozen=True)
class _Run:
    """z − s g for one choice of the factors, with the tolerances that belong to it."""

    plan: Plan
    factor: Array
    f: Callable[..., Tree]
    raveled: FlatFunction
    moved: bool = False


class _First(NamedTuple):
    """The direction of g(z0) `(batch, n)`, and ‖z0‖ `(batch,)`."""

    along: Array
    size: Array


@dataclass(frozen=True)
class _Equations:
    """The equations of one call."""

    plan: Plan
    g: Callable[..., Tree]
    args: tuple[Any, ...]

    def bound(self, factor: Array, max_steps: Any = None) -> _Run:
        """Return the fixed-point problem with these factors `(batch,)`; a sample with the factor 0 stays."""
        control = _criteria(self.plan, factor)
        control = control if max_steps is None else control._replace(max_steps=max_steps)
        plan, f = self.plan._replace(control=control), _as_fixed_point(self.plan, self.g, factor)
        return _Run(plan, factor, f, plan.space.wrap(f))

    def probe(self, z: Array, along: Array | None = None) -> tuple[Array, Array]:
        """Return a direction `(batch, n)` and the factor of each sample along it, `(batch,)`; NaN where there is none.

        Args:
            z: where.
            along: the direction; None: that of g(z).
        """
        backend, flat = self.plan.backend, self.plan.space.wrap(self._square)

        def beside(z: Array, along: Array, *args: Any) -> Array:
            return backend.xp.concat([flat(z, *args), along], axis=1)

        given = backend.xp.zeros_like(z) if along is None else along
        slope = backend.autodiff.forward_only(beside, z, (given, *self.args), _Slope(backend, own=along is None))
        return backend.detach(slope.z), backend.detach(slope.residual)

    def _square(self, z: Tree, *args: Any) -> Tree:
        value = self.g(z, *args)
        _check_square(self.plan, value)
        return value

    def flat(self, run: _Run, forward: SolveResult, first: _First) -> tuple[Array, Array]:
        """Return which samples miss the tolerance by the slope at `forward.z`, and their factors there, `(batch,)`."""
        backend, xp, detach = self.plan.backend, self.plan.backend.xp, self.plan.backend.detach
        z, fz = detach(forward.z), detach(forward.fz)
        _, factor = self.probe(z, first.along)
        size = backend.norm(fz)
        growth = xp.abs(factor / run.factor)
        residual = greater(xp, detach(forward.residual), 0.5 * backend.eps(z) * size)  # z − s g is rounded to z
        size = greater(xp, size, NEAR_ZERO * first.size)
        tolerance = run.plan.control.atol + run.plan.control.rtol * size / growth
        missed = (growth > FLATTER) & (residual > FLATTER * tolerance)  # False where the factor is NaN
        return missed & (detach(forward.status) == int(Status.CONVERGED)), factor

    def judged(self, run: _Run, forward: SolveResult, first: _First) -> tuple[_Run, SolveResult] | None:
        """Continue the samples that meet the tolerance only because g is steeper at z0.

        Returns:
            The factors of the end, and the result with them. None: all is as it was. Where the program is compiled, and
            for strategies of fixed steps, no step is taken, but the status says so.
        """
        backend, xp, strategy = self.plan.backend, self.plan.backend.xp, self.plan.strategy
        fixed = isinstance(strategy, StepStrategy) and not strategy.solves()
        traced = backend.is_traced(backend.detach(forward.status))
        holds = backend.guards.holds
        if forward.fz is None or (not traced and not fixed and holds(xp.all(backend.detach(forward.steps) == 0))):
            return None
        missed, factor = self.flat(run, forward, first)
        if traced or fixed:
            other = xp.full_like(forward.status, int(Status.FIXED_STEPS if fixed else Status.STALLED))
            return run, forward._replace(status=xp.where(missed, other, forward.status))
        if holds(xp.all(~missed)):
            return None
        return self._continued(run, forward, missed, factor, first)

    def attached(
        self, run: _Run, forward: SolveResult, value: Array, record: BackwardRecord | None
    ) -> tuple[_Run, SolveResult, Array, BackwardRecord | None]:
        """Return what `judged` returned with the value and record that belong to it."""
        if run.moved:
            still = self.bound(run.factor, max_steps=0)
            value, again, record = still.plan.run(still.raveled, forward.z, self.args, None)
            forward = forward._replace(carry=again.carry)
        return run, forward, value, record

    def _continued(
        self, run: _Run, forward: SolveResult, missed: Array, factor: Array, first: _First
    ) -> tuple[_Run, SolveResult]:
        """Solve again with new factors for the samples `missed`, until they meet the tolerance where they end."""
        backend, xp, detach = self.plan.backend, self.plan.backend.xp, self.plan.backend.detach
        end = forward._replace(
            **{
                name: detach(getattr(forward, name))
                for name in ("z", "fz", "residual", "status", "steps", "evaluations")
            }
        )
        for _ in range(ROUNDS):
            run = replace(self.bound(xp.where(missed, factor, run.factor)), moved=True)
            moving = self.bound(xp.where(missed, factor, xp.zeros_like(factor)))
            solve = BoundSolve(backend, self.plan.solver, moving.plan.control)
            resumed = backend.autodiff.forward_only(moving.raveled, end.z, self.args, solve)
            end = _merged(backend, missed, resumed, end)
            missed, factor = self.flat(run, end, first)
            if backend.guards.holds(xp.all(~missed)):
                break
        return run, end._replace(status=xp.where(missed, xp.full_like(end.status, int(Status.STALLED)), end.status))


def _merged(backend: Backend, rows: Array, new: SolveResult, old: SolveResult) -> SolveResult:
    """Return the result of `new` in `rows` `(batch,)`, with the steps of both, and `old` elsewhere."""
    xp, detach = backend.xp, backend.detach
    more = {
        name: getattr(old, name) + xp.where(rows, detach(getattr(new, name)), xp.zeros_like(getattr(old, name)))
        for name in ("steps", "evaluations")
    }
    return old._replace(
        z=backend.select(rows, detach(new.z), old.z),
        fz=backend.select(rows, detach(new.fz), old.fz),
        residual=xp.where(rows, detach(new.residual), old.residual),
        status=xp.where(rows, detach(new.status), old.status),
        **more,
    )


@dataclass(frozen=True)
class _Slope:
    """What `forward_only` calls for `probe`. Equal ones share compiled code.

    Attributes:
        backend: the backend of the arrays.
        own: whether the direction is that of g(z).
    """

    backend: Backend
    own: bool

    def __call__(self, run: Map, z: Array) -> SolveResult:
        """Return the direction as `z` and the factor as `residual`, for a `run` that returns g beside the direction."""
        n = z.shape[1]
        with self.backend.errstate():
            both = run(z)
            value = both[:, :n] if self.own else both[:, n:]
            factor = _factor(self.backend, lambda z: run(z)[:, :n], z, value)
        return SolveResult(value, None, factor, None, None, None, None)


def _factor(backend: Backend, run: Map, z: Array, value: Array) -> Array:
    """Return s `(batch,)` from one product of the Jacobian of g with `value`; NaN where it shows no sign or size."""
    xp = backend.xp
    norm = backend.norm(value)
    one = xp.ones_like(norm)
    unknown = xp.full_like(norm, float("nan"))
    jvp = backend.autodiff.jvp(run, z) if backend.capabilities.jvp else None
    if jvp is None:
        return unknown
    safe = xp.where((norm > 0.0) & xp.isfinite(norm), norm, one)
    direction = value * backend.cast(1.0 / safe, value)[:, None]
    try:
        slope = jvp(direction)
    except BackendError:  # g has no products
        return unknown
    size = backend.norm(slope)
    sound = (size > 0.0) & xp.isfinite(size) & (norm > 0.0) & xp.isfinite(norm)
    size = xp.where(sound, size, one)
    along = backend.cast(backend.inner(direction, slope * backend.cast(1.0 / size, slope)[:, None]), norm)
    aligned = xp.abs(along) >= ALIGNED
    part = xp.where(aligned, along, one)
    factor = part / size
    usable = sound & xp.isfinite(factor) & (factor != 0.0)
    return backend.detach(xp.where(usable, factor, unknown))


def _criteria(plan: Plan, factor: Array) -> StoppingCriteria:
    """Return the tolerances in units of z: |s| ‖g‖ ≤ |s| atol + rtol ‖z − s g‖."""
    atol = plan.control.atol
    if isinstance(atol, float) and atol == 0.0:
        return plan.control
    return plan.control._replace(atol=plan.backend.xp.abs(factor) * atol)


def _as_fixed_point(plan: Plan, g: Callable[..., Tree], factor: Array) -> Callable[..., Tree]:
    """Return z − s g(z) on trees."""
    backend = plan.backend

    def f(z: Tree, *args: Any) -> Tree:
        leaves, structure = backend.flatten(z)
        values = backend.flatten(g(z, *args))[0]
        carried = {position for position, _ in plan.space.carried}
        pairs = enumerate(zip(leaves, values, strict=True))
        stepped = [z if i in carried else z - _beside(plan, factor, z) * value for i, (z, value) in pairs]
        return backend.unflatten(structure, stepped)

    f.__wrapped__ = g  # type: ignore[attr-defined] # backward passes are counted for g
    return f


def _beside(plan: Plan, factor: Array, leaf: Array) -> Array:
    """Return the factors in a shape that multiplies a leaf of the state."""
    factor = plan.backend.cast(factor, leaf)
    return plan.backend.xp.reshape(factor, (*leaf.shape[: plan.space.axes], *[1] * (leaf.ndim - plan.space.axes)))


def _equations(plan: Plan, forward: SolveResult, factor: Array) -> Tree:
    """Return g(z) from z and z − s g(z)."""
    return plan.space.unravel((forward.z - forward.fz) / plan.backend.cast(factor, forward.z)[:, None])


def _check_square(plan: Plan, value: Tree) -> None:
    """Check that there are as many equations as unknowns, leaf by leaf."""
    backend, space = plan.backend, plan.space
    leaves, structure = backend.flatten(value)
    if structure == space.structure:
        leaves = moved(leaves, space.carried)
    shapes = [tuple(getattr(leaf, "shape", ())) for leaf in leaves]
    if structure != space.structure or shapes != [tuple(shape) for shape in space.shapes]:
        raise ProblemError(
            f"root: g must return as many equations as unknowns, a tree like z0 with leaves of the shapes "
            f"{', '.join(map(str, space.shapes))} (got {', '.join(map(str, shapes)) or 'none'}). Return one number per "
            f"unknown; for a least-squares problem take its gradient."
        )
