"""Solve, and attach the implicit gradient.

The solve runs on inputs without tangents; then one of the `derivative_rules` attaches the gradient to the result.
All of it is one `jax.jit` whose key is the structure of f, the solver and the strategy: see `jit_cache.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

import jax
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from deqcore.abc.adjoint import AdjointSolver
from deqcore.errors import StrategyError
from deqcore.solve.loop import BoundSolve
from deqcore.types import (
    Map,
    SolveResult,
    Status,
    StoppingCriteria,
    Tree,
)
from deqcore_jax.adjoint_tap import AdjointTap
from deqcore_jax.closure import Program, is_traced, trace
from deqcore_jax.derivative_rules import AttachedSolve, Numbers, Pair, attach_exact, attach_reverse
from deqcore_jax.failures import is_staged
from deqcore_jax.jit_context import precise
from deqcore_jax.loop import recorded

Steps: TypeAlias = Callable[[Map, jax.Array, SolveResult | None, ArrayLike], jax.Array]

EQUILIBRIUM: Final = "deqcore_equilibrium"
"""The name of what the backward pass needs of a solve, for policies of `jax.checkpoint` that save by name."""


def solve(
    f: Callable[..., jax.Array],
    z0: jax.Array,
    args: tuple[Tree, ...],
    iterate: Callable[..., SolveResult],
    adjoint: AdjointSolver | None = None,
    adjoint_tap: AdjointTap | None = None,
    memory: jax.Array | None = None,
) -> tuple[jax.Array, SolveResult]:
    """Trace f, solve, attach the gradient.

    Args:
        f: `f(z, *args)` on `(batch, n)`.
        z0: initial iterate `(batch, n)`.
        args: any trees.
        iterate: the loop with everything but f and z0 bound.
        adjoint: how gradients are found; None attaches none.
        adjoint_tap: where the backward pass is reported.
        memory: the state of a strategy that has one; its gradient is the next state.

    Returns:
        The value `(batch, n)`, and the result of the solver (without gradient).
    """
    if jax.config.jax_disable_jit and not is_traced((z0, args)):
        with precise():  # f runs on values, so that it can print, stop and branch
            forward = iterate(lambda z: f(z, *args), z0)
        if not is_traced((forward.z, forward.fz)):
            return forward.z, forward
    program, leaves = trace(f, z0, args)
    if not is_traced((leaves, adjoint_tap, memory)):
        adjoint = None  # no caller can request a gradient
    turn = None
    if adjoint is not None:
        staged = is_staged()
        adjoint = adjoint.compiled(staged=staged, observed=adjoint_tap is not None)
        turn = None if staged else np.int32(adjoint.turn())
    numbers = None
    if isinstance(iterate, BoundSolve):
        control = iterate.control
        numbers = Numbers(control.rtol, control.atol, control.max_steps, iterate.resume)
        iterate = BoundSolve(iterate.backend, iterate.solver, StoppingCriteria(0.0, 0.0, 0, *control[3:]))
    problem = AttachedSolve(program, iterate, adjoint)
    try:
        return _run(problem, z0, numbers, leaves, adjoint_tap, memory, turn)
    except TypeError as error:
        if adjoint is None or "custom_vjp" not in str(error):
            raise
        raise _no_forward_mode(problem, adjoint_tap) from error


def _no_forward_mode(problem: AttachedSolve, adjoint_tap: AdjointTap | None) -> StrategyError:
    """Return the error for jvp, jacfwd or hessian of a value that is a `jax.custom_vjp` function."""
    limit = "has reverse mode only, not forward mode (jvp, jacfwd, hessian)"
    if not problem.bound.exact:
        name = problem.bound.name
        return StrategyError(f"{name} {limit}. Use backward.strategy = 'exact-ift' without an adjoint tap.")
    if adjoint_tap is not None:
        return StrategyError(
            f"A solve with an adjoint tap {limit}. Use backward.strategy = 'exact-ift' without an adjoint tap."
        )
    return StrategyError(
        f"f calls a jax.custom_vjp function, which {limit}. Use reverse mode (jax.grad, jax.jacrev; "
        f"jax.jacrev(jax.grad(...)) for second derivatives), or give the function a jax.custom_jvp rule."
    )


@partial(jax.jit, static_argnums=0)
def _run(
    problem: AttachedSolve,
    z0: jax.Array,
    numbers: Numbers | None,
    leaves: list[jax.Array],
    adjoint_tap: AdjointTap | None,
    memory: jax.Array | None,
    turn: np.int32 | None,
) -> tuple[jax.Array, SolveResult]:
    start, *rest = lax.stop_gradient((lax.convert_element_type(z0, z0.dtype), numbers, leaves))
    # XLA would compute norms of a constant z0 while it compiles: 2 s for 256 × 512 zeros.
    forward = problem.solve(lax.optimization_barrier(start), *rest)
    if problem.adjoint is None:
        return forward.z, forward
    known = (forward.status == int(Status.CONVERGED), forward.residual) if memory is not None else ()
    needed = forward.z, forward.carry.state if problem.adjoint.uses_state else (), known
    z, solver_state, known = checkpoint_name(needed, EQUILIBRIUM)
    if adjoint_tap is None and problem.both_modes:
        return attach_exact(problem, z, (solver_state, turn), leaves), forward
    return attach_reverse(problem, z, (solver_state, turn, known), leaves, adjoint_tap, memory), forward


def record(
    f: Callable[..., jax.Array],
    z0: jax.Array,
    args: tuple[Tree, ...],
    steps: Steps,
    forward: SolveResult | None,
    step: ArrayLike = 0,
) -> jax.Array:
    """Trace f, and differentiate through `steps` (see `deqcore.abc.autodiff.Autodiff.differentiate_through`)."""
    program, leaves = trace(f, z0, args)
    return _record(program, steps, z0, leaves, forward, step)


@partial(jax.jit, static_argnums=(0, 1))
def _record(
    program: Program,
    steps: Steps,
    z0: jax.Array,
    leaves: list[jax.Array],
    forward: SolveResult | None,
    step: ArrayLike,
) -> jax.Array:
    with recorded():
        return steps(lambda z: program(z, leaves), z0, forward, step)


@jax.custom_jvp
def straight_through(value: jax.Array, carrier: jax.Array) -> jax.Array:
    """Return `value` with the derivative of `carrier`."""
    return value


@straight_through.defjvp
def _straight_through_jvp(primals: Pair, tangents: Pair) -> Pair:
    return straight_through(*primals), tangents[1]
