"""Root finding by the fixed-point machinery: g(z) = 0 is z = z − s g(z), with a factor s per sample.

The factor has the sign and the size of one Newton step along g: with d = G g(z0) for the Jacobian G of g at z0, it is
s = ⟨g, d⟩ / ⟨d, d⟩, so that z − s g has a residual in the units of z. The gradient does not depend on s, because
(I − J)⁻¹ s = G⁻¹ for J = I − s G.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from deqcore.abc.backend import Backend
from deqcore.errors import BackendError, ConfigError, ProblemError
from deqcore.solution import Solution, SolveState
from deqcore.solve.leaves import moved
from deqcore.solve.observer import Solve
from deqcore.solve.plan import Plan
from deqcore.solve.report import report_failure, report_nondeterminism
from deqcore.types import Array, Map, SolveResult, StoppingCriteria, Tree

ALIGNED: Final = 1e-3  # cosine of g and G g below which their product does not give the sign


def solve(plan: Plan, g: Callable[..., Tree], z0: Tree, args: tuple[Any, ...], state: SolveState | None) -> Solution:
    """Return the solution of g(z, *args) = 0, with the residual ‖g‖ and `fz` = g(z)."""
    if plan.config.forward.compact:
        raise ConfigError(
            "root: forward.compact must be false, because the factor of each sample belongs to the whole batch (got "
            "true). Set forward.compact = false."
        )
    backend, start = plan.backend, plan.space.ravel(z0)
    measured = _probe(plan, g, z0, args, start)
    factor = backend.detach(measured.residual)
    plan = replace(plan, control=_criteria(plan, factor))
    f = _as_fixed_point(plan, g, factor)
    raveled = plan.space.wrap(f)
    value, forward, record = plan.run(raveled, start, args, state)
    forward = forward._replace(residual=forward.residual / backend.xp.abs(factor))
    solution = plan.solution(value, forward, record)
    if solution.fz is not None:
        solution = replace(solution, fz=_equations(plan, forward, factor))
    if plan.observer is not None:
        plan.observer.solved(Solve(solution, plan.config, 0.0, f, z0, args))
    report_nondeterminism(plan, raveled, args, forward, record)
    report_failure(plan, raveled, forward)
    return solution


def _probe(plan: Plan, g: Callable[..., Tree], z0: Tree, args: tuple[Any, ...], start: Array) -> SolveResult:
    """Return g(z0) as `z` and the factor of each sample as `residual`, `(batch,)`."""
    backend = plan.backend

    def square(z: Tree, *args: Any) -> Tree:
        value = g(z, *args)
        _check_square(plan, value)
        return value

    def probe(run: Map, z: Array) -> SolveResult:
        with backend.errstate():
            value = run(z)
            return SolveResult(value, None, _factor(backend, run, z, value), None, None, None, None)

    return backend.autodiff.forward_only(plan.space.wrap(square), start, args, probe)


def _factor(backend: Backend, run: Map, z: Array, value: Array) -> Array:
    """Return s `(batch,)` from one product with the Jacobian of g; 1 where it shows neither sign nor size."""
    xp = backend.xp
    norm = backend.norm(value)
    one = xp.ones_like(norm)
    jvp = backend.autodiff.jvp(run, z) if backend.capabilities.jvp else None
    if jvp is None:
        return one
    safe = xp.where((norm > 0.0) & xp.isfinite(norm), norm, one)
    direction = value * backend.cast(1.0 / safe, value)[:, None]
    try:
        slope = jvp(direction)
    except BackendError:  # g has no products
        return one
    size = backend.norm(slope)
    sound = (size > 0.0) & xp.isfinite(size) & (norm > 0.0) & xp.isfinite(norm)
    size = xp.where(sound, size, one)
    along = backend.cast(backend.inner(direction, slope * backend.cast(1.0 / size, slope)[:, None]), norm)
    aligned = xp.abs(along) >= ALIGNED
    part = xp.where(aligned, along, one)
    factor = part / size
    usable = sound & xp.isfinite(factor) & (factor != 0.0)
    return backend.detach(xp.where(usable, factor, one))


def _criteria(plan: Plan, factor: Array) -> StoppingCriteria:
    """Return the tolerances in units of z: |s| ‖g‖ ≤ |s| atol + rtol ‖z − s g‖."""
    return plan.control._replace(atol=plan.backend.xp.abs(factor) * plan.control.atol)


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
