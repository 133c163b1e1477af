"""The deblurring model in JAX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from deblurring import modes
from jax import Array, lax
from jax.nn import relu

import deqcore


def convolve(x: Array, p: Any, name: str) -> Array:
    found = lax.conv(x, p[f"{name}.weight"], (1, 1), "SAME")
    return found + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else found


def denoise(p: Any, z: Array) -> Array:
    hidden = relu(convolve(relu(convolve(z, p, "deq.cell.first")), p, "deq.cell.second"))
    return 0.5 * z + convolve(hidden, p, "deq.cell.third")


def cell(z: Array, p: Any, blurred: Array) -> Array:
    """z ← (AᵀA + λ)⁻¹ (Aᵀ y + λ D(z)), D(z) = z/2 + a small convolutional network."""
    q, values = map(jnp.asarray, modes())
    gains, weight = jnp.outer(values, values), jnp.exp(p["deq.cell.log_weight"])
    wanted = gains * (q.T @ blurred @ q) + weight * (q.T @ denoise(p, z) @ q)
    return q @ (wanted / (gains**2 + weight)) @ q.T


def loss(p: Any, settings: Any, blurred: Array, sharp: Array) -> Array:
    found = deqcore.fixed_point(cell, blurred, p, blurred, **settings).value
    return 100 * jnp.mean((found - sharp) ** 2)


def predict(p: Any, settings: Any, blurred: Array) -> tuple[Array, Array, Array]:
    """Return the images, the steps that each took, and whether it converged."""
    solution = deqcore.fixed_point(cell, blurred, p, blurred, **settings)
    return solution.value, solution.steps, solution.converged
