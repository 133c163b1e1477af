"""The refining block in JAX, and the same refinement by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from attractor import LAYERS, RTOL, STEPS
from common import linear, part
from jax import Array, lax
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from text_jax import cell, layer, norm

import deqcore


def refine(p: Any, settings: Any, h: Array, step: Any) -> Array:
    """Return the equilibrium that is reached from h, at a training step."""
    return deqcore.fixed_point(cell, h, p, h, backward__step=step, **settings).value


@jax.custom_vjp
def equilibrium(p: Any, h: Array, steps: int = STEPS, rtol: float = RTOL) -> Array:
    """Return the equilibrium by hand."""

    def running(carry: Any) -> Array:
        k, before, z = carry
        moved, size = (jnp.linalg.norm(a.reshape(len(a), -1), axis=1) for a in (z - before, z))
        return (k < steps) & jnp.any(moved > rtol * size)

    start = 1, h, cell(h, p, h)
    return lax.while_loop(running, lambda carry: (carry[0] + 1, carry[2], cell(carry[2], p, h)), start)[2]


def _forward(p: Any, h: Array, steps: int = STEPS, rtol: float = RTOL) -> Any:
    z = equilibrium(p, h, steps, rtol)
    return z, (z, p, h)


def _backward(kept: Any, g: Array) -> Any:
    _, vjp = jax.vjp(cell, *kept)
    return *vjp(g + vjp(g)[0])[1:], None, None


equilibrium.defvjp(_forward, _backward)


def refine_by_hand(p: Any, settings: Any, h: Array, step: Any) -> Array:
    return equilibrium(p, h)


def predict(p: Any, settings: Any, windows: Array, step: Any = 0, refine: Any = refine) -> Array:
    """Return the negative log-probability of each next character, `(batch, length)`."""
    h = p["embed.weight"][windows[:, :-1]] + p["place"]
    for k in range(LAYERS):
        h = layer(h, part(p, f"cells.{k}."))
    z = refine(part(p, "deq.cell."), settings, norm(h), step)
    return cross_entropy(linear(p, "read", z), windows[:, 1:])


def loss(p: Any, settings: Any, windows: Array, step: Array, refine: Any = refine) -> Array:
    return predict(p, settings, windows, step, refine).mean()
