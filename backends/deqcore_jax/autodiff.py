"""Differentiation by JAX's transformations."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.autodiff import Autodiff
from deqcore.abc.two_state import TwoState
from deqcore.solve.adjoint import Adjoint
from deqcore.types import BackwardRecord, Map, SolveResult, Tree
from deqcore_jax import adjoint_tap, implicit, reversible, strategy_state
from deqcore_jax.closure import is_array, is_differentiable, trace
from deqcore_jax.jit_context import as_outside
from deqcore_jax.linearize import product


class JaxAutodiff(Autodiff):
    """`jax.vjp`, `jax.linearize` and a custom derivative for the fixed point."""

    def linearize(self, f: Map, z: jax.Array) -> tuple[jax.Array, Map]:
        with as_outside():
            fz, vjp = jax.vjp(f, z)
        return fz, lambda u: vjp(u)[0]

    def jvp(self, f: Map, z: jax.Array) -> Map:
        with as_outside():
            return product(f, z)

    def forward_only(
        self,
        f: Callable[..., jax.Array],
        z0: jax.Array,
        args: tuple[Tree, ...],
        solve: Callable[[Map, jax.Array], SolveResult],
    ) -> SolveResult:
        return implicit.solve(f, z0, args, solve)[1]

    def implicit(
        self,
        f: Callable[..., jax.Array],
        z0: jax.Array,
        args: tuple[Tree, ...],
        solve: Callable[[Map, jax.Array], SolveResult],
        adjoint: AdjointSolver,
    ) -> tuple[jax.Array, SolveResult, BackwardRecord | None]:
        memory = strategy_state.take(adjoint.strategy) if isinstance(adjoint, Adjoint) else None
        value, forward = implicit.solve(f, z0, args, solve, adjoint, adjoint_tap.take(z0.shape[0]), memory)
        return value, forward, None

    def differentiate_through(
        self,
        f: Callable[..., jax.Array],
        z0: jax.Array,
        args: tuple[Tree, ...],
        steps: Callable[[Map, jax.Array, SolveResult | None, ArrayLike], jax.Array],
        forward: SolveResult | None,
        step: ArrayLike = 0,
    ) -> jax.Array:
        return implicit.record(f, z0, args, steps, forward, step)

    def repeat(
        self, body: Callable[[Map, jax.Array, ArrayLike], jax.Array], f: Map, z: jax.Array, times: ArrayLike
    ) -> jax.Array:
        program, leaves = trace(f, z, ())
        start, still = lax.stop_gradient((z, leaves))
        run = lambda z: program(z, still)  # noqa: E731
        result: jax.Array = lax.fori_loop(0, times, lambda i, z: body(run, z, i), start)
        return lax.stop_gradient(result)

    def reversible(self, f: Map, z0: jax.Array, rule: TwoState, steps: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        return reversible.iterate(f, z0, rule, steps)

    def straight_through(self, value: jax.Array, carrier: jax.Array) -> jax.Array:
        return implicit.straight_through(value, carrier)

    def checkpoint(self, f: Map) -> Map:
        return jax.checkpoint(f)

    def vjp(
        self, value: Callable[..., tuple[jax.Array, Tree]], args: tuple[Tree, ...], cotangent: jax.Array
    ) -> tuple[jax.Array, Tree, tuple[Tree, ...]]:
        leaves, structure = self.be.flatten(args)
        moving = [i for i, leaf in enumerate(leaves) if is_array(leaf) and is_differentiable(leaf)]

        def of_leaves(*moved: jax.Array) -> tuple[jax.Array, Tree]:
            merged = list(leaves)
            for i, leaf in zip(moving, moved, strict=True):
                merged[i] = leaf
            return value(*self.be.unflatten(structure, merged))

        primal, vjp, aux = jax.vjp(of_leaves, *[jnp.asarray(leaves[i]) for i in moving], has_aux=True)
        gradients: list[jax.Array | None] = [None] * len(leaves)
        for i, gradient in zip(moving, vjp(cotangent), strict=True):
            gradients[i] = gradient
        return primal, aux, self.be.unflatten(structure, gradients)

    def grad(self, fn: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        gradient: Callable[[jax.Array], jax.Array] = jax.grad(fn)
        return gradient
