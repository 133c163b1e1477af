"""Differentiation by JAX's transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.autodiff import Autodiff
from deqcore.types import BackwardRecord, Map, SolveResult
from deqcore_jax import adjoint_tap, implicit
from deqcore_jax.closure import is_array, is_differentiable
from deqcore_jax.jit_context import as_outside
from deqcore_jax.linearize import product


class JaxAutodiff(Autodiff):
    """`jax.vjp`, `jax.linearize` and a custom derivative for the fixed point."""

    def linearize(self, f: Map, z: Any) -> tuple[Any, Map]:
        with as_outside():
            fz, vjp = jax.vjp(f, z)
        return fz, lambda u: vjp(u)[0]

    def jvp(self, f: Map, z: Any) -> Map:
        with as_outside():
            return product(f, z)

    def forward_only(
        self, f: Callable[..., Any], z0: Any, args: tuple[Any, ...], solve: Callable[[Map, Any], SolveResult]
    ) -> SolveResult:
        return implicit.solve(f, z0, args, solve)[1]

    def implicit(
        self,
        f: Callable[..., Any],
        z0: Any,
        args: tuple[Any, ...],
        solve: Callable[[Map, Any], SolveResult],
        adjoint: AdjointSolver,
    ) -> tuple[Any, SolveResult, BackwardRecord | None]:
        value, forward = implicit.solve(f, z0, args, solve, adjoint, adjoint_tap.take(z0.shape[0]))
        return value, forward, None

    def differentiate_through(
        self,
        f: Callable[..., Any],
        z0: Any,
        args: tuple[Any, ...],
        steps: Callable[[Map, Any, SolveResult | None], Any],
        forward: SolveResult | None,
    ) -> Any:
        return implicit.record(f, z0, args, steps, forward)

    def straight_through(self, value: Any, carrier: Any) -> Any:
        return implicit.straight_through(value, carrier)

    def checkpoint(self, f: Map) -> Map:
        return jax.checkpoint(f)

    def vjp(
        self, value: Callable[..., tuple[Any, Any]], args: tuple[Any, ...], cotangent: Any
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        leaves, structure = self.be.flatten(args)
        moving = [i for i, leaf in enumerate(leaves) if is_array(leaf) and is_differentiable(leaf)]

        def of_leaves(*moved: Any) -> tuple[Any, Any]:
            merged = list(leaves)
            for i, leaf in zip(moving, moved, strict=True):
                merged[i] = leaf
            return value(*self.be.unflatten(structure, merged))

        primal, vjp, aux = jax.vjp(of_leaves, *[jnp.asarray(leaves[i]) for i in moving], has_aux=True)
        gradients: list[Any] = [None] * len(leaves)
        for i, gradient in zip(moving, vjp(cotangent), strict=True):
            gradients[i] = gradient
        return primal, aux, self.be.unflatten(structure, gradients)

    def grad(self, fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        gradient: Callable[[Any], Any] = jax.grad(fn)
        return gradient
