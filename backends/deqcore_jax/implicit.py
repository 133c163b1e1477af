"""Solve, and attach the implicit gradient.

The solve runs on inputs without tangents; then the gradient is attached to what it found. With lin the derivative of
f at z*, recorded once for products with J and for the gradients of the leaves:

    exact strategies    custom_jvp:  dz* = (I − J)^-1 lin(0, dθ), by lax.custom_linear_solve, whose transpose is the
                        strategy's route. All of JAX's transformations follow, to any order in principle: the rule
                        linearises at an *attached* z*, so that second derivatives know that z* moves with θ.
    approximate ones    custom_vjp:  dθ = (∂f/∂θ)ᵀ solve_adjoint(vjp, g). Reverse mode, first order; more is refused.
    exact, but f calls  custom_vjp:  dθ = (∂f/∂θ)ᵀ u, and u = (I − J)^-T g has a derivative of its own. Reverse mode
    a jax.custom_vjp    of any order; J v is the transpose of f's own backward rule.
    function

All of it is one `jax.jit` whose key is the structure of f, the solver and the strategy: see `interning.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from deqcore.errors import StrategyError
from deqcore.linear.transposed import transposed
from deqcore.solve.adjoint import Adjoint
from deqcore.solve.loop import BoundSolve
from deqcore.solve.traced_failures import Place
from deqcore.types import AdjointReport, SolveResult, StoppingCriteria
from deqcore_jax.adjoint_tap import AdjointTap, fill
from deqcore_jax.closure import Program, is_differentiable, is_traced, trace
from deqcore_jax.failures import bound, checked, place_of
from deqcore_jax.jit_context import precise
from deqcore_jax.linearize import Linear, Reverse, forward_only, no_reverse_mode
from deqcore_jax.loop import recorded


class Numbers(NamedTuple):
    """What may change without compiling again."""

    rtol: Any
    atol: Any
    max_steps: Any
    resume: Any


@dataclass(frozen=True)
class Problem:
    """What is compiled for: f, the method, the strategy (None: no gradient is attached), the line that warns."""

    program: Program
    iterate: Any  # a Drive without its numbers, or any callable like one
    adjoint: Adjoint | None
    place: Place | None

    def solve(self, z0: Any, numbers: Numbers | None, leaves: list[Any]) -> SolveResult:
        """Run the solver; products of coefficients in full precision, f as it was traced."""
        iterate = self.iterate
        if numbers is not None:
            rtol, atol, max_steps, resume = numbers
            control = iterate.control._replace(rtol=rtol, atol=atol, max_steps=max_steps)
            iterate = BoundSolve(iterate.backend, iterate.solver, control, resume)
        with precise():
            found: SolveResult = iterate(lambda z: self.program(z, leaves), z0)
        return found

    @property
    def bound(self) -> Adjoint:
        """The strategy, where there is one."""
        assert self.adjoint is not None
        return self.adjoint

    @property
    def both_modes(self) -> bool:
        """Whether the gradient is a true derivative, and f has forward mode, too."""
        return self.bound.strategy.exact and not self.program.reverse_only


def solve(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...],
    iterate: Callable[..., SolveResult],
    adjoint: Adjoint | None = None,
    adjoint_tap: AdjointTap | None = None,
) -> tuple[Any, SolveResult]:
    """Trace f, solve, attach the gradient.

    Args:
        f: `f(z, *args)` on `(batch, n)`.
        z0: initial state `(batch, n)`.
        args: any trees.
        drive: the loop with everything but f and z0 bound.
        adjoint: how gradients are found; None attaches none.
        adjoint_tap: where the backward pass is reported.

    Returns:
        The value `(batch, n)`, and what the solver did (without gradient).
    """
    program, leaves = trace(f, z0, args)
    if not is_traced((leaves, adjoint_tap)):
        adjoint = None  # nobody can ask for a gradient
    adjoint = None if adjoint is None else bound(adjoint)
    place = None if adjoint is None else place_of(adjoint)
    numbers = None
    if isinstance(iterate, BoundSolve):
        control = iterate.control
        numbers = Numbers(control.rtol, control.atol, control.max_steps, iterate.resume)
        iterate = BoundSolve(iterate.backend, iterate.solver, StoppingCriteria(0.0, 0.0, 0, *control[3:]))
    problem = Problem(program, iterate, adjoint, place)
    try:
        return _run(problem, z0, numbers, leaves, adjoint_tap)
    except TypeError as error:
        if adjoint is None or "custom_vjp" not in str(error):
            raise
        raise _no_forward_mode(problem, adjoint_tap) from error


def _no_forward_mode(problem: Problem, adjoint_tap: AdjointTap | None) -> StrategyError:
    """The error for jvp, jacfwd or hessian of a value that is a `jax.custom_vjp` function."""
    asked = "has reverse mode only, but forward mode (jvp, jacfwd, hessian) was asked for"
    if not problem.bound.strategy.exact:
        name = type(problem.bound.strategy).__name__
        return StrategyError(f"{name} {asked}: use backward.strategy = 'exact-ift' without a adjoint_tap.")
    if adjoint_tap is not None:
        return StrategyError(
            f"A solve that reports to a adjoint_tap {asked}: use backward.strategy = 'exact-ift' without a adjoint_tap."
        )
    return StrategyError(
        f"f calls a jax.custom_vjp function, which {asked}. Use reverse mode (jax.grad, jax.jacrev; "
        f"jax.jacrev(jax.grad(...)) for second derivatives), or give the function a jax.custom_jvp rule."
    )


@partial(jax.jit, static_argnums=0)
def _run(
    problem: Problem, z0: Any, numbers: Numbers | None, leaves: list[Any], adjoint_tap: AdjointTap | None
) -> tuple[Any, SolveResult]:
    still = lax.stop_gradient((lax.convert_element_type(z0, z0.dtype), numbers, leaves))
    forward = problem.solve(*still)
    if problem.adjoint is None:
        return forward.z, forward
    state = forward.carry.state if problem.adjoint.uses_state else ()
    if adjoint_tap is None and problem.both_modes:
        return _exact(problem, forward.z, state, leaves), forward
    return _reverse(problem, forward.z, state, leaves, adjoint_tap), forward


def record(
    f: Callable[..., Any], z0: Any, args: tuple[Any, ...], steps: Callable[..., Any], forward: SolveResult | None
) -> Any:
    """Trace f, and differentiate through `steps` (see `deqcore.abc.backend.Backend.differentiate_through`)."""
    program, leaves = trace(f, z0, args)
    return _record(program, steps, z0, leaves, forward)


@partial(jax.jit, static_argnums=(0, 1))
def _record(program: Program, steps: Any, z0: Any, leaves: list[Any], forward: SolveResult | None) -> Any:
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
    b = linear.jvp_leaves(list(moved.values()))
    return z, (_solution if linear.reversible else _solution_forward)(problem, linear, b, state)


def _solution(problem: Problem, linear: Linear, b: Any, state: Any) -> Any:
    """(I − J)^-1 b, with a transpose."""
    return lax.custom_linear_solve(
        lambda v: v - linear.jvp(v),
        b,
        lambda _, b: _route_forward(problem, linear, b, state)[0],
        lambda _, g: _solve_adjoint(problem, linear, g, state)[0],
    )


def _solution_forward(problem: Problem, linear: Linear, b: Any, state: Any) -> Any:
    """(I − J)^-1 b for an f without reverse mode."""

    def solve(_: Any, b: Any) -> Any:
        return _route_forward(problem, linear, b, state)[0]

    return forward_only(lax.custom_linear_solve(lambda v: v - linear.jvp(v), b, solve))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reverse(problem: Problem, z: Any, state: Any, leaves: list[Any], adjoint_tap: AdjointTap | None) -> Any:
    """`z` as a function of the leaves, and of the adjoint_tap that it does not depend on."""
    return z


def _reverse_fwd(
    problem: Problem, z: Any, state: Any, leaves: list[Any], adjoint_tap: AdjointTap | None
) -> tuple[Any, Any]:
    if problem.both_modes:
        z = _exact(problem, z, state, leaves)
    elif problem.bound.strategy.exact:
        z = _reverse(problem, z, state, leaves, None)
    return z, (z, state, leaves, adjoint_tap)


def _reverse_bwd(problem: Problem, residuals: Any, g: Any) -> Any:
    z, state, leaves, adjoint_tap = residuals
    moved = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]
    linear: Linear | Reverse
    if problem.both_modes:
        linear = Linear(problem.program, z, leaves, moved)
        if not linear.reversible:
            raise no_reverse_mode()
        u, report = lax.custom_linear_solve(
            lambda v: v - linear.vjp(v),
            g,
            lambda _, b: _solve_adjoint(problem, linear, b, state),
            lambda _, b: _route_forward(problem, linear, b, state),
            has_aux=True,
        )
    elif problem.bound.strategy.exact:
        linear = Reverse(problem.program, z, leaves, moved)
        u, report = _adjoint(problem, z, state, leaves, g)
    else:
        z, state, leaves, g = _first_order_only(type(problem.bound.strategy).__name__, (z, state, leaves, g))
        linear = Reverse(problem.program, z, leaves, moved, products=problem.bound.uses_vjp)
        u, report = _solve_adjoint(problem, linear, g, state)
    found = iter(linear.vjp_leaves(u))
    gradients = [next(found) if i in moved else None for i in range(len(leaves))]
    return None, None, gradients, None if adjoint_tap is None else fill(report)


_reverse.defvjp(_reverse_fwd, _reverse_bwd)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _adjoint(problem: Problem, z: Any, state: Any, leaves: list[Any], g: Any) -> tuple[Any, AdjointReport]:
    """u ≈ (I − J)^-T g where f has reverse mode only, so that only its second derivatives need J v."""
    return _solve_adjoint(problem, Reverse(problem.program, z, leaves, []), g, state)


@_adjoint.defjvp
def _adjoint_jvp(problem: Problem, primals: Any, tangents: Any) -> Any:
    """The tangent of u = g + Jᵀu: du = (I − J)^-T (dg + d(Jᵀ) u)."""
    z, state, leaves, g = primals
    dz, _, dleaves, dg = tangents
    u, report = _adjoint(problem, z, state, leaves, g)
    moved = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]

    def pulled(z: Any, *at: Any) -> Any:
        merged = dict(zip(moved, at, strict=True))
        every = [merged.get(i, leaf) for i, leaf in enumerate(leaves)]
        return Reverse(problem.program, z, every, []).vjp(u)

    turned = jax.jvp(pulled, (z, *[leaves[i] for i in moved]), (dz, *[dleaves[i] for i in moved]))[1]
    linear = Reverse(problem.program, z, leaves, [])
    linear.jvp(z)  # an f whose rule is not linear is refused here, by name
    du = lax.custom_linear_solve(
        lambda v: v - linear.vjp(v),
        dg + turned,
        lambda _, b: _solve_adjoint(problem, linear, b, state)[0],
        lambda _, b: _route_forward(problem, linear, b, state)[0],
    )
    return (u, report), (du, AdjointReport(*map(_no_tangent, report)))


def _no_tangent(x: Any) -> Any:
    return jnp.zeros_like(x) if is_differentiable(x) else np.zeros(x.shape, jax.dtypes.float0)


def _solve_adjoint(problem: Problem, linear: Linear | Reverse, g: Any, state: Any) -> tuple[Any, AdjointReport]:
    """u ≈ (I − J)^-T g."""
    with precise():
        u, report = problem.bound(linear.vjp, g, state)
        return checked(problem.bound, problem.place, u, report), report


def _route_forward(problem: Problem, linear: Linear | Reverse, b: Any, state: Any) -> tuple[Any, AdjointReport]:
    """x ≈ (I − J)^-1 b: the same kind of equation, with J v in place of Jᵀu and H in place of Hᵀ."""
    with precise():
        x, report = transposed(problem.bound)(linear.jvp, b, state)
        return checked(problem.bound, problem.place, x, report), report


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_order_only(strategy: str, values: Any) -> Any:
    return values


@_first_order_only.defjvp
def _refuse(strategy: str, primals: Any, tangents: Any) -> Any:
    raise StrategyError(
        f"The gradient of {strategy} was differentiated again, but it is an approximation whose derivative is not "
        f"that of the fixed point: use backward.strategy = 'exact-ift' for second derivatives."
    )
