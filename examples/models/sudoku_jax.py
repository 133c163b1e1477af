"""The looped reasoner in JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from common import linear
from jax import Array, nn
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from sudoku import SURE, peers

import deqcore
from deqcore.halting import until


def cell(z: Array, p: Any, x: Array) -> Array:
    """z ← tanh(x + update(relu(message(own state, the mean of each group, the mean over digits))))."""
    groups = jnp.einsum("gij,bjkd->gbikd", jnp.asarray(peers()), z)
    digits = jnp.broadcast_to(z.mean(2, keepdims=True), z.shape)
    seen = jnp.concatenate([z, *groups, digits], -1)
    return jnp.tanh(x + linear(p, "deq.cell.update", nn.relu(linear(p, "deq.cell.message", seen))))


def solve(p: Any, settings: Any, clues: Array, cell: Any = cell) -> Any:
    x = linear(p, "inject", clues)
    return deqcore.fixed_point(cell, jnp.zeros_like(x), p, x, **settings)


def loss(p: Any, settings: Any, clues: Array, answers: Array) -> Array:
    logits = linear(p, "read", solve(p, settings, clues).value)[..., 0]
    return cross_entropy(logits, answers).mean()


def predict(p: Any, settings: Any, clues: Array) -> tuple[Array, Array, Array]:
    """Return the digits, the steps that each puzzle took, and whether it halted by itself."""

    def sure(z: Array, fz: Array) -> Array:
        """Return whether every digit of a puzzle is sure."""
        return nn.softmax(linear(p, "read", fz)[..., 0]).max(-1).min(-1) > SURE

    solution = solve(p, settings, clues, until(cell, sure))
    return linear(p, "read", solution.value)[..., 0].argmax(-1), solution.steps, solution.converged
