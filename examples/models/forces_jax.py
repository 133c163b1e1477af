"""The force field in JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from common import linear
from forces import CENTRES, SPREAD
from jax import Array

import deqcore


def cell(z: Array, p: Any, x: Array, radial: Array) -> Array:
    """z ← tanh(x + own z + Σⱼ filter(rᵢⱼ) ⊙ other zⱼ) for states `(batch, atoms, width)`."""
    message = linear(p, "deq.cell.filter", radial) * linear(p, "deq.cell.other", z)[:, None]
    return jnp.tanh(x + linear(p, "deq.cell.own", z) + message.sum(2))


def energy(positions: Array, p: Any, settings: Any) -> Array:
    """Sum the energies of the batch: the force on a cluster depends on its own energy only."""
    between = positions[:, :, None] - positions[:, None]
    alone = jnp.eye(positions.shape[1], dtype=positions.dtype)
    r = jnp.sqrt((between**2).sum(-1) + alone)  # the root has no derivative at 0
    radial = jnp.exp(-(((r[..., None] - CENTRES) / SPREAD) ** 2) / 2) * (1 - alone)[..., None]
    x = linear(p, "inject", radial.sum(2))
    z = deqcore.fixed_point(cell, jnp.zeros_like(x), p, x, radial, **settings).value
    return linear(p, "read", jnp.tanh(linear(p, "hidden", z))).sum() + linear(p, "pair", radial).sum()


def predict(p: Any, settings: Any, positions: Array) -> Array:
    return -jax.grad(energy)(positions, p, settings)


def loss(p: Any, settings: Any, positions: Array, target: Array) -> Array:
    return jnp.mean((predict(p, settings, positions) - target) ** 2)
