"""The multiscale image classifier in JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from common import linear, part
from images import NORM_GROUPS
from jax import Array, lax
from jax.nn import relu
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

import deqcore

States = tuple[Array, Array]


def convolve(p: Any, name: str, x: Array, stride: int = 1) -> Array:
    return lax.conv_general_dilated(x, p[f"{name}.weight"], (stride, stride), ((1, 1), (1, 1)))


def group_norm(x: Array) -> Array:
    grouped = x.reshape(len(x), NORM_GROUPS, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    return (centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)).reshape(x.shape)


def quadrants(x: Array) -> Array:
    """Return the means over the four quarters of an image, `(batch, channels · 4)`."""
    batch, channels, size, _ = x.shape
    return x.reshape(batch, channels, 2, size // 2, 2, size // 2).mean((3, 5)).reshape(batch, -1)


def cell(z: States, p: Any, x: States) -> States:
    """Add messages from both resolutions to the image's features; group norms keep the states bounded."""
    low, high = relu(z[0]), relu(z[1])
    up = convolve(p, "high_low", high).repeat(2, axis=2).repeat(2, axis=3)
    first = convolve(p, "low_low", low) + up
    second = convolve(p, "low_high", low, 2) + convolve(p, "high_high", high)
    return group_norm(x[0] + first), group_norm(x[1] + second)


def forward(p: Any, settings: Any, images: Array, blocks: int) -> tuple[Array, Any]:
    low = group_norm(convolve(p, "low", images))
    x = low, group_norm(convolve(p, "high", relu(low), 2))
    z, solution = x, None
    if blocks:
        for k in range(blocks):
            z = cell(z, part(p, f"cells.{k}."), x)
    else:
        solution = deqcore.fixed_point(cell, jax.tree.map(jnp.zeros_like, x), part(p, "deq.cell."), x, **settings)
        z = solution.value
    return linear(p, "read", jnp.concatenate([quadrants(relu(state)) for state in z], 1)), solution


def loss(p: Any, settings: Any, images: Array, digits: Array, width: int = 0, blocks: int = 0) -> Array:
    return cross_entropy(forward(p, settings, images, blocks)[0], digits).mean()


def predict(p: Any, settings: Any, images: Array, width: int = 0, blocks: int = 0) -> tuple[Array, ...]:
    """Return the logits and, for the equilibrium model, the steps of each solve and whether it converged."""
    logits, solution = forward(p, settings, images, blocks)
    return (logits,) if solution is None else (logits, solution.steps, solution.converged)
