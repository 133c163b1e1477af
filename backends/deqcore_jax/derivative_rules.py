"""The derivative rules of a solved value: how JAX differentiates z* as a function of what f reads.

With lin the derivative of f at z*, recorded once for products with J and for the gradients of the leaves:

    exact strategies    custom_jvp:  dz* = (I − J)^-1 lin(0, dθ), by lax.custom_linear_solve, whose transpose is
                        `solve_adjoint`. All of JAX's transformations follow, to any order in principle: the rule
                        linearises at an *attached* z*, so that second derivatives take into account that z* depends
                        on θ.
    approximate ones    custom_vjp:  dθ = (∂f/∂θ)ᵀ solve_adjoint(vjp, g). Reverse mode of first order only.
    exact, but f calls  custom_vjp:  dθ = (∂f/∂θ)ᵀ u, and u = (I − J)^-T g has its own derivative. Reverse mode of any
    a jax.custom_vjp    order; J v is the transpose of f's own backward rule.
    function
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Never, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from deqcore.abc.adjoint import AdjointSolver
from deqcore.errors import StrategyError
from deqcore.solve.loop import BoundSolve
from deqcore.types import (
    AdjointReport,
    LoopState,
    Map,
    PassInputs,
    SolveResult,
    Tree,
)
from deqcore_jax.adjoint_tap import AdjointTap, fill
from deqcore_jax.closure import Program, is_differentiable
from deqcore_jax.deferred import deferred
from deqcore_jax.jit_context import precise
from deqcore_jax.linearize import Linear, Reverse, forward_only, no_reverse_mode

Pair: TypeAlias = tuple[jax.Array, jax.Array]
Residuals: TypeAlias = tuple[jax.Array, Tree, list[jax.Array], AdjointTap | None, jax.Array | None]


class Numbers(NamedTuple):
    """The values that may change without compiling again."""

    rtol: ArrayLike
    atol: ArrayLike
    max_steps: ArrayLike
    resume: LoopState | None


@dataclass(frozen=True)
class AttachedSolve:
    """What is compiled for: f, the method, the strategy (None: no gradient is attached)."""

    program: Program
    iterate: Callable[[Map, jax.Array], SolveResult]  # a BoundSolve without its numbers, or any callable like one
    adjoint: AdjointSolver | None

    def solve(self, z0: jax.Array, numbers: Numbers | None, leaves: list[jax.Array]) -> SolveResult:
        """Run the solver, with products of coefficients in full precision and f as it was traced."""
        iterate = self.iterate
        if numbers is not None:
            assert isinstance(iterate, BoundSolve)
            rtol, atol, max_steps, resume = numbers
            control = iterate.control._replace(rtol=rtol, atol=atol, max_steps=max_steps)
            iterate = BoundSolve(iterate.backend, iterate.solver, control, resume)
        with precise():
            return iterate(lambda z: self.program(z, leaves), z0)

    @property
    def bound(self) -> AdjointSolver:
        """The strategy, where there is one."""
        assert self.adjoint is not None
        return self.adjoint

    @property
    def both_modes(self) -> bool:
        """Whether the gradient is a true derivative, and f has forward mode, too."""
        return self.bound.exact and not self.program.reverse_only


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def attach_exact(problem: AttachedSolve, z: jax.Array, state: Tree, leaves: list[jax.Array]) -> jax.Array:
    """Return `z` as a function of the leaves."""
    return z


@partial(attach_exact.defjvp, symbolic_zeros=True)
def _attach_exact_jvp(problem: AttachedSolve, primals: Tree, tangents: Tree) -> Pair:
    z, state, leaves = primals
    z = attach_exact(problem, z, state, leaves)
    moved = {i: t for i, t in enumerate(tangents[2]) if not isinstance(t, SymbolicZero)}
    linear = Linear(problem.program, z, leaves, list(moved))
    b = linear.jvp_leaves(list(moved.values()))
    return z, (_solution if linear.reversible else _solution_forward)(problem, linear, b, state)


def _solution(problem: AttachedSolve, linear: Linear, b: jax.Array, state: Tree) -> jax.Array:
    """Return (I − J)^-1 b, with a transpose."""
    return lax.custom_linear_solve(
        lambda v: v - linear.jvp(v),
        b,
        lambda _, b: _tangent(problem, linear, b, state),
        lambda _, g: _solve_adjoint(problem, linear, g, state)[0],
    )


def _tangent(problem: AttachedSolve, linear: Linear, b: jax.Array, state: Tree) -> jax.Array:
    """Return (I − J)^-1 b, traced only where it is needed: reverse mode drops it."""
    jvp = linear.jvp

    def solve(b: jax.Array, consts: list[jax.Array], state: Tree) -> jax.Array:
        return _solve_tangent(problem, lambda v: jvp.at(v, consts), b, state)[0]

    eager = problem.bound.calls_host or jvp.jaxpr.effects  # JAX must see effects
    return (solve if eager else partial(deferred, solve))(b, jvp.consts, state)


def _solution_forward(problem: AttachedSolve, linear: Linear, b: jax.Array, state: Tree) -> jax.Array:
    """Return (I − J)^-1 b for an f without reverse mode."""

    def solve(_: Map, b: jax.Array) -> jax.Array:
        return _solve_tangent(problem, linear.jvp, b, state)[0]

    return forward_only(lax.custom_linear_solve(lambda v: v - linear.jvp(v), b, solve))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attach_reverse(
    problem: AttachedSolve,
    z: jax.Array,
    state: Tree,
    leaves: list[jax.Array],
    adjoint_tap: AdjointTap | None,
    memory: jax.Array | None,
) -> jax.Array:
    """Return `z` as a function of the leaves, and of the adjoint tap and the memory, which it does not depend on."""
    return z


def _attach_reverse_fwd(
    problem: AttachedSolve,
    z: jax.Array,
    state: Tree,
    leaves: list[jax.Array],
    adjoint_tap: AdjointTap | None,
    memory: jax.Array | None,
) -> tuple[jax.Array, Residuals]:
    if problem.both_modes:
        z = attach_exact(problem, z, state[:2], leaves)
    elif problem.bound.exact:
        z = attach_reverse(problem, z, state, leaves, None, None)
    return z, (z, state, leaves, adjoint_tap, memory)


def _attach_reverse_bwd(
    problem: AttachedSolve, residuals: Residuals, g: jax.Array
) -> tuple[None, None, list[jax.Array | None], AdjointTap | None, jax.Array | None]:
    z, (solver_state, turn, known), leaves, adjoint_tap, memory = residuals
    state: Tree = (solver_state, turn)
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
            lambda _, b: _solve_tangent(problem, linear.jvp, b, state),
            has_aux=True,
        )
    elif problem.bound.exact:
        linear = Reverse(problem.program, z, leaves, moved)
        u, report = _adjoint(problem, z, state, leaves, g)
    else:
        z, state, leaves, g = _first_order_only(problem.bound.name, (z, state, leaves, g))
        linear = Reverse(problem.program, z, leaves, moved, products=problem.bound.uses_vjp)
        if memory is None:
            u, report = _solve_adjoint(problem, linear, g, state)
        else:
            converged, residual = known
            inputs = PassInputs(memory, converged, residual, linear.vjp_leaves if moved else None)
            with precise():
                u, report, memory = problem.bound.advance(linear.vjp, g, solver_state, turn, inputs)
    cotangents = iter(linear.vjp_leaves(u))
    gradients = [next(cotangents) if i in moved else None for i in range(len(leaves))]
    return None, None, gradients, None if adjoint_tap is None else fill(report, adjoint_tap.runs.shape), memory


attach_reverse.defvjp(_attach_reverse_fwd, _attach_reverse_bwd)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _adjoint(
    problem: AttachedSolve, z: jax.Array, state: Tree, leaves: list[jax.Array], g: jax.Array
) -> tuple[jax.Array, AdjointReport]:
    """Return u ≈ (I − J)^-T g where f has reverse mode only, so that only its second derivatives need J v."""
    return _solve_adjoint(problem, Reverse(problem.program, z, leaves, []), g, state)


@_adjoint.defjvp
def _adjoint_jvp(problem: AttachedSolve, primals: Tree, tangents: Tree) -> tuple[Tree, Tree]:
    """Return the tangent of u = g + Jᵀu: du = (I − J)^-T (dg + d(Jᵀ) u)."""
    z, state, leaves, g = primals
    dz, _, dleaves, dg = tangents
    u, report = _adjoint(problem, z, state, leaves, g)
    moved = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]

    def pulled(z: jax.Array, *at: jax.Array) -> jax.Array:
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
        lambda _, b: _solve_tangent(problem, linear.jvp, b, state)[0],
    )
    return (u, report), (du, AdjointReport(*map(_no_tangent, report)))


def _no_tangent(x: jax.Array) -> ArrayLike:
    return jnp.zeros_like(x) if is_differentiable(x) else np.zeros(x.shape, jax.dtypes.float0)


def _solve_adjoint(
    problem: AttachedSolve, linear: Linear | Reverse, g: jax.Array, state: Tree
) -> tuple[jax.Array, AdjointReport]:
    """Return u ≈ (I − J)^-T g."""
    with precise():
        return problem.bound(linear.vjp, g, *state)


def _solve_tangent(problem: AttachedSolve, jvp: Map, b: jax.Array, state: Tree) -> tuple[jax.Array, AdjointReport]:
    """Return x ≈ (I − J)^-1 b: the same kind of equation, with J v instead of Jᵀu and H instead of Hᵀ."""
    with precise():
        return problem.bound.transposed()(jvp, b, *state)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _first_order_only(strategy: str, values: Tree) -> Tree:
    return values


@_first_order_only.defjvp
def _refuse(strategy: str, primals: Tree, tangents: Tree) -> Never:
    raise StrategyError(
        f"The gradient of {strategy} was differentiated again, but it is an approximation, whose derivative is not "
        f"that of the fixed point. Use backward.strategy = 'exact-ift' for second derivatives."
    )
