"""The gradient on a backend without a tape: solve the adjoint equation, then differentiate one evaluation of f."""

from __future__ import annotations

import time
from typing import Any

from deqcore.abc.arrays import is_inexact
from deqcore.abc.backward import StepStrategy, refuse_vjp
from deqcore.solve.adjoint import Steps, vjp_in_units
from deqcore.solve.flatten import FlatFunction
from deqcore.solve.loop import BoundSolve
from deqcore.solve.opaque import arrays_in
from deqcore.solve.plan import Plan
from deqcore.types import Array, BackwardRecord, Map, PassInputs, SolveResult, Status


def differentiate(
    plan: Plan, f: FlatFunction, z0: Array, args: tuple[Any, ...], g: Array
) -> tuple[Array, tuple[Any, ...], SolveResult, BackwardRecord | None]:
    """Return z*, gradients for `args`, the result of the solver and a record of the adjoint solve.

    Where `Plan.differentiate` leaves the gradient to the tape, this calls the strategy itself. Step strategies have no
    adjoint equation: their steps are differentiated.
    """
    solve = BoundSolve(plan.backend, plan.solver, plan.control, narrow=plan.narrow(f, args))
    strategy = plan.strategy
    if isinstance(strategy, StepStrategy):
        solved = plan.backend.autodiff.forward_only(f, z0, args, solve) if strategy.solves() else None
        steps = Steps(plan.backend, strategy, plan.solver)
        primal, reached, gradients = vjp_in_units(
            plan.backend, lambda *moved: steps(lambda z: f(z, *moved), z0, solved, plan.step), args, g
        )
        forward = plan.unsolved(primal, reached) if solved is None else solved
        plan.verify_steps(f, args, forward.z, primal)
        return plan.backend.guards.unshared(forward.z, z0), gradients, forward, None
    forward = plan.backend.autodiff.forward_only(f, z0, args, solve)
    adjoint = plan.adjoint(f)
    vjp: Map = refuse_vjp
    if adjoint.next_uses_vjp():
        _, vjp = plan.backend.autodiff.linearize(lambda z: f(z, *args), forward.z)
    with plan.backend.errstate():
        start = time.perf_counter()
        u, report = adjoint(vjp, g, forward.carry.state, None, _inputs(plan, f, args, forward))
        record = BackwardRecord()
        record.add(report, time.perf_counter() - start)
    again, _, gradients = vjp_in_units(plan.backend, lambda *moved: (f(forward.z, *moved), None), args, u)
    with plan.backend.errstate():
        record.nondeterminism = plan.backend.norm(again - forward.fz)
    return plan.backend.guards.unshared(forward.z, z0), gradients, forward, record


def _inputs(plan: Plan, f: FlatFunction, args: tuple[Any, ...], forward: SolveResult) -> PassInputs:
    """Return what a strategy with state gets where there is no tape: each product differentiates f again."""
    autodiff, z = plan.backend.autodiff, forward.z

    def parameter_vjp(u: Array) -> tuple[Array, ...]:
        gradients = autodiff.vjp(lambda *moved: (f(z, *moved), None), args, u)[2]
        return tuple(part for part in plan.backend.flatten(gradients)[0] if part is not None)

    differentiable = any(is_inexact(plan.backend.dtype_name(leaf)) for leaf in arrays_in(plan.backend, args))
    converged = forward.status == int(Status.CONVERGED)
    return PassInputs(None, converged, forward.residual, parameter_vjp if differentiable else None)
