"""The causal transformer in JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from common import linear, part
from jax import Array, lax
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from text import HEADS

import deqcore


def norm(z: Array) -> Array:
    centred = z - z.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def attend(p: Any, z: Array) -> Array:
    batch, length, _ = z.shape
    query, key, value = (a.reshape(batch, length, HEADS, -1) for a in jnp.split(linear(p, "mix", z), 3, axis=-1))
    return linear(p, "out", jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(z.shape))


def think(p: Any, z: Array) -> Array:
    return linear(p, "second", jax.nn.relu(linear(p, "first", z)))


def cell(z: Array, p: Any, x: Array) -> Array:
    """Add the text at each step and normalise the state, so that states stay bounded."""
    heard = norm(x + z / 2 + attend(p, z))
    return norm(heard + think(p, heard))


def layer(z: Array, p: Any) -> Array:
    """Apply an explicit layer: residual, normalised first."""
    z = z + attend(p, norm(z))
    return z + think(p, norm(z))


def predict(p: Any, settings: Any, windows: Array, width: int, hidden: int, layers: int) -> Array:
    """Return the negative log-probability of each next character, `(batch, length)`."""
    x = p["embed.weight"][windows[:, :-1]] + p["place"]
    if layers:
        z = x
        for k in range(layers):
            z = layer(z, part(p, f"cells.{k}."))
        z = norm(z)
    else:
        z = deqcore.fixed_point(cell, jnp.zeros_like(x), part(p, "deq.cell."), x, **settings).value
    return cross_entropy(linear(p, "read", z), windows[:, 1:])


def loss(p: Any, settings: Any, windows: Array, **shape: int) -> Array:
    return predict(p, settings, windows, **shape).mean()
