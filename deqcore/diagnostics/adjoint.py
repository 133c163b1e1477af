"""A strategy's gradient taken apart: u, the gradients of arguments, and what it reports, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deqcore.abc.backward import StepStrategy, Strategy, report
from deqcore.abc.stateful import StatefulStrategy
from deqcore.linear.gmres import gmres
from deqcore.linear.grouped import Groups
from deqcore.solve.adjoint import Adjoint, Steps
from deqcore.solve.loop import BoundSolve
from deqcore.solve.plan import Plan
from deqcore.solve.verification import adjoint_residual, leak_everywhere
from deqcore.types import AdjointReport, Array, Map, PassInputs, SolveResult, Status

TURNS = 3  # passes of a strategy with state, the last of which counts
REFERENCE_EPS = 100.0  # the reference is solved to this many units of rounding, 1e-10 at least


@dataclass(frozen=True)
class AdjointSolved:
    """The result of one backward pass.

    Attributes:
        u: what stands for (I − J)^-T g, `(batch, n)`. For a strategy that differentiates steps, the gradient of a
            shift of f, which is the same thing.
        gradients: of the arguments, as `Autodiff.vjp` gives them.
        report: of an implicit strategy, else None.
        residual: ‖g + Jᵀu − u‖ / ‖g‖ per sample, measured for this u, `(batch,)`.
    """

    u: Array
    gradients: tuple[Any, ...]
    report: AdjointReport | None
    residual: Array


def solve(plan: Plan, f: Callable[..., Array], z0: Array, args: tuple[Any, ...]) -> SolveResult:
    """Return the forward solve of a call, with no gradient recorded."""
    return plan.backend.autodiff.forward_only(f, z0, args, BoundSolve(plan.backend, plan.solver, plan.control))


def by_strategy(
    plan: Plan, f: Callable[..., Array], z0: Array, args: tuple[Any, ...], g: Array, forward: SolveResult
) -> AdjointSolved:
    """Return the call's own strategy, at the solution that it shares with the reference."""
    vjp = vjp_at(plan, f, args, forward) if starts_at_solution(plan.strategy) else None
    u, gradients, report = apply_strategy(plan, f, z0, args, g, forward, vjp)
    return AdjointSolved(u, gradients, report, residual_of(plan, g, u, vjp))


def starts_at_solution(strategy: Strategy | StepStrategy) -> bool:
    """Return whether the strategy uses the forward solve, so that its residual can be measured at the solution."""
    return not isinstance(strategy, StepStrategy) or strategy.solves()


def apply_strategy(
    plan: Plan,
    f: Callable[..., Array],
    z0: Array,
    args: tuple[Any, ...],
    g: Array,
    forward: SolveResult,
    vjp: Map | None,
    *,
    audited: bool = True,
) -> tuple[Array, tuple[Any, ...], AdjointReport | None]:
    """Return u, the gradients of the arguments and the report of the call's own strategy, see `AdjointSolved`.

    Args:
        plan: the call.
        f: of raveled states.
        z0: initial iterate `(batch, n)`.
        args: of f.
        g: cotangent `(batch, n)`.
        forward: the solve, as `solve` returns it.
        vjp: `u ↦ Jᵀu` at the solution; only a strategy that differentiates steps needs none.
        audited: whether a strategy with state has audited this problem before, as in the middle of a training.
    """
    backend, strategy = plan.backend, plan.strategy
    if isinstance(strategy, StepStrategy):
        steps = Steps(backend, strategy, plan.solver)
        begin = forward if strategy.solves() else None

        def value(shift: Array, *moved: Any) -> tuple[Array, None]:
            return backend.autodiff.differentiate_through(
                lambda z, s, *rest: f(z, *rest) + s, z0, (shift, *moved), steps, begin
            )[0], None

        _, _, (u, *gradients) = backend.autodiff.vjp(value, (0 * z0, *args), g)
        return u, tuple(gradients), None
    assert vjp is not None
    adjoint = Adjoint(backend, strategy, plan.solver, units=plan.control.units)
    with backend.errstate():
        if audited and isinstance(strategy, StatefulStrategy):
            u, report = _after_audits(plan, strategy, adjoint, vjp, f, args, g, forward)
        else:
            u, report = adjoint(vjp, g, forward.carry.state)
    return u, _gradients(plan, f, args, u, forward.z), report


def residual_of(plan: Plan, g: Array, u: Array, vjp: Map | None) -> Array:
    """Return ‖g + Jᵀu − u‖ / ‖g‖ per sample; NaN without `vjp`, for a strategy that solves nothing to measure it at."""
    backend, samples = plan.backend, samples_of(plan)
    if vjp is None:
        return backend.xp.full_like(backend.norm(samples.join(g)), float("nan"))
    with backend.errstate():
        return adjoint_residual(backend, samples.joined(vjp), samples.join(g), samples.join(u))


def samples_of(plan: Plan) -> Groups:
    """Return the groups of rows that are samples."""
    return Groups(plan.backend, plan.space.units)


def _after_audits(
    plan: Plan, strategy: StatefulStrategy, adjoint: Adjoint, vjp: Map, f: Callable[..., Array], args: tuple[Any, ...],
    g: Array, forward: SolveResult,
) -> tuple[Array, AdjointReport]:  # fmt: skip
    """Return what a strategy with state does in its third pass on this problem, which the first two have audited."""
    backend = plan.backend

    def parameter_vjp(u: Array) -> tuple[Array, ...]:
        return tuple(part for part in backend.flatten(_gradients(plan, f, args, u, forward.z))[0] if part is not None)

    def one(carry: tuple[Array, AdjointReport, Array]) -> tuple[Array, AdjointReport, Array]:
        converged = forward.status == int(Status.CONVERGED)
        inputs = PassInputs(carry[2], converged, forward.residual, parameter_vjp)
        return adjoint.advance(vjp, g, forward.carry.state, None, inputs)

    values = backend.asarray(np.asarray(strategy.init_state(), np.float32), dtype="float32", like=g)
    u, last, _ = backend.scan(one, (g, report(backend, g), values), TURNS)
    return u, last


def vjp_at(plan: Plan, f: Callable[..., Array], args: tuple[Any, ...], forward: SolveResult) -> Map:
    """`u ↦ Jᵀu` at the solution."""
    return plan.backend.autodiff.linearize(lambda z: f(z, *args), forward.z)[1]


def by_reference(
    plan: Plan,
    f: Callable[..., Array],
    args: tuple[Any, ...],
    g: Array,
    forward: SolveResult,
    vjp: Map,
    max_vjps: int,
) -> tuple[AdjointSolved, Any, Any]:
    """Return the same by GMRES to rounding; also its relative residuals and vjps per sample, on the host."""
    backend = plan.backend
    rtol, samples = max(1e-10, REFERENCE_EPS * backend.eps(g)), samples_of(plan)
    product, b = samples.joined(vjp), samples.join(g)
    with backend.errstate():
        result = gmres(backend, product, b, rtol=rtol, max_steps=min(max_vjps, b.shape[1]), shifted=True)
        residual = adjoint_residual(backend, product, b, result.x)
    u = samples.split(result.x)
    routed = AdjointSolved(u, _gradients(plan, f, args, u, forward.z), None, residual)
    return routed, backend.to_numpy(residual).astype(np.float64), backend.to_numpy(result.products)


def coupling(plan: Plan, vjp: Map, forward: SolveResult) -> float:
    """Return how much of Jᵀu lands in other samples than those that u is in: 0 where f treats each alone.

    In norms, for a u in the first sample. Where that finds nothing, the figure is that of
    `deqcore.solve.verification.leak_everywhere`, which separates every pair of samples.
    """
    backend, samples = plan.backend, samples_of(plan)
    vjp, z = samples.joined(vjp), samples.join(forward.z)
    batch, n = z.shape
    if batch < 2:
        return 0.0
    first = np.zeros((batch, n))
    first[0] = np.random.default_rng(0).standard_normal(n)
    with backend.errstate():
        result = backend.to_numpy(vjp(backend.asarray(first, like=z))).astype(np.float64)
        whole = float(np.linalg.norm(result))
        share = float(np.linalg.norm(result[1:])) / whole if whole > 0 else 0.0
        return share if share > 0 else leak_everywhere(backend, vjp, z)


def _gradients(plan: Plan, f: Callable[..., Array], args: tuple[Any, ...], u: Array, z: Array) -> tuple[Any, ...]:
    """(∂f/∂args)ᵀ u by one recorded evaluation of f."""
    if not args:
        return ()
    return plan.backend.autodiff.vjp(lambda *moved: (f(z, *moved), None), args, u)[2]
