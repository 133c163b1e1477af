"""The backward pass of `TwoState` in JAX: a loop that undoes each half step and differentiates it."""

from __future__ import annotations

from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from deqcore.abc.two_state import TwoState
from deqcore.types import Map
from deqcore_jax.closure import Program, is_differentiable, trace

Pair: TypeAlias = tuple[jax.Array, jax.Array]
Leaves: TypeAlias = list[jax.Array]
Residuals: TypeAlias = tuple[jax.Array, jax.Array, Leaves]


def iterate(f: Map, z0: jax.Array, rule: TwoState, steps: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the value, f(z0) and f of the value, see `deqcore.abc.autodiff.Autodiff.reversible`."""
    program, leaves = trace(f, z0, ())
    value, first = _run(program, rule, steps, z0, leaves)
    return value, first, program(*lax.stop_gradient((value, leaves)))


def _forward(program: Program, rule: TwoState, steps: int, z0: jax.Array, leaves: Leaves) -> tuple[Pair, jax.Array]:
    """Return both states after all steps, and f(z0)."""
    f = partial(program, leaves=leaves)
    first = f(z0)
    pair = rule.step(f, rule.start(z0), first)
    return lax.fori_loop(0, steps - 1, lambda _, pair: rule.step(f, pair), pair), first


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run(program: Program, rule: TwoState, steps: int, z0: jax.Array, leaves: Leaves) -> Pair:
    (_, z), first = _forward(program, rule, steps, z0, leaves)
    return rule.down(z), first


def _run_fwd(program: Program, rule: TwoState, steps: int, z0: jax.Array, leaves: Leaves) -> tuple[Pair, Residuals]:
    (y, z), first = _forward(program, rule, steps, z0, leaves)
    return (rule.down(z), first), (y, z, leaves)


def _run_bwd(
    program: Program, rule: TwoState, steps: int, residuals: Residuals, cotangents: Pair
) -> tuple[None, list[jax.Array | None]]:
    y, z, leaves = residuals
    g = cotangents[0]  # f(z0) carries no gradient
    moved = [i for i, leaf in enumerate(leaves) if is_differentiable(leaf)]

    def evaluate(at: jax.Array, chosen: Leaves) -> jax.Array:
        merged = dict(zip(moved, chosen, strict=True))
        return program(at, [merged.get(i, leaf) for i, leaf in enumerate(leaves)])

    def undo(
        other: jax.Array, state: jax.Array, g_other: jax.Array, g_state: jax.Array, sums: Leaves
    ) -> tuple[jax.Array, jax.Array, jax.Array, Leaves]:
        value, vjp = jax.vjp(evaluate, rule.down(other), [leaves[i] for i in moved])
        pulled, parts = vjp(rule.damping * g_state)
        sums = [a + b for a, b in zip(sums, parts, strict=True)]
        return rule.half_back(state, value), g_other + pulled, (1.0 - rule.damping) * g_state, sums

    def step(
        _: int, carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array, Leaves]
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, Leaves]:
        y, z, gy, gz, sums = carry
        z, gy, gz, sums = undo(y, z, gy, gz, sums)
        y, gz, gy, sums = undo(z, y, gz, gy, sums)
        return y, z, gy, gz, sums

    start = y, z, jnp.zeros_like(g), g, [jnp.zeros_like(leaves[i]) for i in moved]
    sums = iter(lax.fori_loop(0, steps, step, start)[-1])
    return None, [next(sums) if i in moved else None for i in range(len(leaves))]


_run.defvjp(_run_fwd, _run_bwd)
