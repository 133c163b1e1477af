"""The implicit graph network in JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from common import linear
from graph import RADIUS
from jax import Array
from jax.nn import relu
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

import deqcore


def cell(z: Array, p: Any, x: Array, adjacency: Array) -> Array:
    """z ← relu(Â z Wᵀ + x) for states `(nodes, width)`, ‖W‖∞ at most `RADIUS`."""
    w = p["deq.cell.weight"]
    scale = jnp.minimum(1.0, RADIUS / jnp.abs(w).sum(1).max())
    return relu(adjacency @ (z @ (scale * w).T) + x)


def predict(p: Any, settings: Any, adjacency: Array, features: Array, explicit: bool = False) -> Array:
    x = linear(p, "inject", adjacency @ features)
    if explicit:
        return linear(p, "read", adjacency @ relu(adjacency @ (relu(x) @ p["deq.cell.weight"].T)))
    z = deqcore.fixed_point(cell, jnp.zeros_like(x), p, x, adjacency, **settings).value
    return linear(p, "read", z)


def loss(
    p: Any, settings: Any, adjacency: Array, features: Array, groups: Array, train: Array, explicit: bool = False
) -> Array:
    logits = predict(p, settings, adjacency, features, explicit)
    return cross_entropy(logits[train], groups[train]).mean()
