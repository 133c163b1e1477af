"""Solve, and attach the implicit gradient.

The solve runs on inputs without tangents; then the gradient is attached to what it found. With lin the derivative of
f at z*, recorded once for products with J and for the gradients of the leaves:

    exact strategies    custom_jvp:  dz* = (I − J)^-1 lin(0, dθ), by lax.custom_linear_solve, whose transpose is the
                        strategy's route. All of JAX's transformations follow, to any order in principle: the rule
                        linearises at an *attached* z*, so that second derivatives know that z* moves with θ.
    approximate ones    custom_vjp:  dθ = (∂f/∂θ)ᵀ route(pull, g). Reverse mode, first order; more is refused.

All of it is one `jax.jit` whose key is the structure of f, the solver and the strategy: see `interning.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero

from deqcore.driver import Control, Drive, Forward
from deqcore.errors import StrategyError
from deqcore.linear.transposed import transposed
from deqcore.strategy import Adjoint, AdjointReport
from deqcore_jax.context import precise
from deqcore_jax.linearize import Linear
from deqcore_jax.loop import recorded
from deqcore_jax.probe import Probe, fill
from deqcore_jax.program import Program, is_differentiable, is_traced, trace


class Numbers(NamedTuple):
    """What may change without compiling again."""

    rtol: Any
    atol: Any
    max_steps: Any
    resume: Any


@dataclass(frozen=True)
class Problem:
    """What is compiled for: f, the method, the strategy (None: no gradient is attached)."""

    program: Program
    drive: Any  # a Drive without its numbers, or any callable like one
    adjoint: Adjoint | None

    def solve(self, z0: Any, numbers: Numbers | None, leaves: list[Any]) -> Forward:
        """Run the solver; products of coefficients in full precision, f as it was traced."""
        drive = self.drive
        if numbers is not None:
            rtol, atol, max_steps, resume = numbers
            control = drive.control._replace(rtol=rtol, atol=atol, max_steps=max_steps)
            drive = Drive(drive.backend, drive.solver, control, resume)
        with precise():
            found: Forward = drive(lambda z: self.program(z, leaves), z0)
        return found

    @property
    def bound(self) -> Adjoint:
        """The strategy, where there is one."""
        assert self.adjoint is not None
        return self.adjoint


def solve(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...],
    drive: Callable[..., Forward],
    adjoint: Adjoint | None = None,
    probe: Probe | None = None,
) -> tuple[Any, Forward]:
    """Trace f, solve, attach the gradient.

    Args:
        f: `f(z, *args)` on `(batch, n)`.
        z0: initial state `(batch, n)`.
        args: any trees.
        drive: the driver with everything but f and z0 bound.
        adjoint: how gradients are found; None attaches none.
        probe: where the backward pass is reported.

    Returns:
        The value `(batch, n)`, and what the solver did (without gradient).
    """
    program, leaves = trace(f, z0, args)
    if not is_traced((leaves, probe)):
        adjoint = None  # nobody can ask for a gradient
    numbers = None
    if isinstance(drive, Drive):
        control = drive.control
        numbers = Numbers(control.rtol, control.atol, control.max_steps, drive.resume)
        drive = Drive(drive.backend, drive.solver, Control(0.0, 0.0, 0, *control[3:]))
    try:
        return _run(Problem(program, drive, adjoint), z0, numbers, leaves, probe)
    except TypeError as error:
        if adjoint is None or "custom_vjp" not in str(error):
            raise
        what = type(adjoint.strategy).__name__ if probe is None else "A solve that reports to a probe"
        raise StrategyError(
            f"{what} has reverse mode only, but forward mode (jvp, jacfwd, hessian) was asked for: use "
            f"backward.strategy = 'exact-ift' without a probe."
        ) from error


@partial(jax.jit, static_argnums=0)
def _run(
    problem: Problem, z0: Any, numbers: Numbers | None, leaves: list[Any], probe: Probe | None
) -> tuple[Any, Forward]:
    still = lax.stop_gradient((lax.convert_element_type(z0, z0.dtype), numbers, leaves))
    forward = problem.solve(*still)
    if problem.adjoint is None:
        return forward.z, forward
    state = forward.carry.state if problem.adjoint.uses_state else ()
    if problem.adjoint.strategy.exact and probe is None:
        return _exact(problem, forward.z, state, leaves), forward
    return _reverse(problem, forward.z, state, leaves, probe), forward


def record(
    f: Callable[..., Any], z0: Any, args: tuple[Any, ...], steps: Callable[..., Any], forward: Forward | None
) -> Any:
    """Trace f, and differentiate through `steps` (see `deqcore.backend.Backend.record`)."""
    program, leaves = trace(f, z0, args)
    return _record(program, steps, z0, leaves, forward)


@partial(jax.jit, static_argnums=(0, 1))
def _record(program: Program, steps: Any, z0: Any, leaves: list[Any], forward: Forward | None) -> Any:
    with recorded():
        return steps(lambda z: program(z, leaves), z0, forward)


@jax.custom_jvp
def straight_through(value: Any, carrier: Any) -> Any:
    """`value` with the derivative of `carrier`."""
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    return straight_through(*primals), tangents[1]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _exact(problem: Problem, z: Any, state: Any, leaves: list[Any]) -> Any:
    """`z` as a function of the leaves."""
    return z


@partial(_exact.defjvp, symbolic_zeros=True)
def _exact_jvp(problem: Problem, primals: Any, tangents: Any) -> Any:
    z, state, leaves = primals
    z = _exact(problem, z, state, leaves)
    moved = {i: t for i, t in enumerate(tangents[2]) if not isinstance(t, SymbolicZero)}
    linear = Linear(problem.program, z, leaves, list(moved))
    dz = lax.custom_linear_solve(
        lambda v: v - linear.push(v),
        linear.push_leaves(list(moved.values())),
        lambda _, b: _route_forward(problem, linear, b, state)[0],
        lambda _, g: _route(problem, linear, g, state)[0],
    )
    return z, dz


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reverse(problem: Problem, z: Any, state: Any, leaves: list[Any], probe: Probe | None) -> Any:
    """`z` as a function of the leaves, and of the probe that it does not depend on."""
    return z


def _reverse_fwd(problem: Problem, z: Any, state: Any, leaves: list[Any], probe: Probe | None) -> tuple[Any, Any]:
    if problem.bound.strategy.exact:
        z = _exact(problem, z, state, leaves)
    return z, (z, state, leaves, probe)


def _reverse_bwd(problem: Problem, residuals: Any, g: Any) -> Any:
    z, state, leaves, probe = residuals
    moved = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]
    if problem.bound.strategy.exact:
        linear = Linear(problem.program, z, leaves, moved)
        u, report = lax.custom_linear_solve(
            lambda v: v - linear.pull(v),
            g,
            lambda _, b: _route(problem, linear, b, state),
            lambda _, b: _route_forward(problem, linear, b, state),
            has_aux=True,
        )
    else:
        z, state, leaves, g = _first_order_only(type(problem.bound.strategy).__name__, (z, state, leaves, g))
        linear = Linear(problem.program, z, leaves, moved, products=problem.bound.uses_pull)
        u, report = _route(problem, linear, g, state)
    found = iter(linear.pull_leaves(u))
    gradients = [next(found) if i in moved else None for i in range(len(leaves))]
    return None, None, gradients, None if probe is None else fill(report)


_reverse.defvjp(_reverse_fwd, _reverse_bwd)


def _route(problem: Problem, linear: Linear, g: Any, state: Any) -> tuple[Any, AdjointReport]:
    """u ≈ (I − J)^-T g."""
    with precise():
        return problem.bound(linear.pull, g, state)


def _route_forward(problem: Problem, linear: Linear, b: Any, state: Any) -> tuple[Any, AdjointReport]:
    """x ≈ (I − J)^-1 b: the same kind of equation, with J v in place of Jᵀu and H in place of Hᵀ."""
    with precise():
        return transposed(problem.bound)(linear.push, b, state)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_order_only(strategy: str, values: Any) -> Any:
    return values


@_first_order_only.defjvp
def _refuse(strategy: str, primals: Any, tangents: Any) -> Any:
    raise StrategyError(
        f"The gradient of {strategy} was differentiated again, but it is an approximation whose derivative is not "
        f"that of the fixed point: use backward.strategy = 'exact-ift' for second derivatives."
    )
