"""The recurrent-depth language model in JAX, and the same loop by hand."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from common import linear, part
from jax import Array, lax
from looped_text import RECORDED
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from text_jax import attend, layer, norm, think

import deqcore


def core(z: Array, p: Any, e: Array) -> Array:
    """Take one step of the loop; `e` is the text as the prelude has encoded it."""
    h = linear(p, "adapter", jnp.concatenate([z, e], -1))
    h = h + attend(p, norm(h))
    return norm(h + think(p, norm(h)))


def loop(p: Any, settings: Any, e: Array, step: Array) -> Array:
    """Return the last state of the loop at a training step."""
    return deqcore.fixed_point(core, jnp.zeros_like(e), p, e, backward__step=step, **settings).value


def loop_by_hand(p: Any, settings: Any, e: Array, depth: Array) -> Array:
    """Return the last state of the loop by hand, which takes the depth: NumPy draws it outside the compiled step."""
    still = lax.stop_gradient((p, e))
    first = jnp.maximum(depth - RECORDED, 0)
    z = lax.fori_loop(0, first, lambda _, z: core(z, *still), jnp.zeros_like(e))

    def recorded(z: Array, k: Array) -> tuple[Array, None]:
        return jnp.where(first + k < depth, core(z, p, e), z), None

    return lax.scan(recorded, lax.stop_gradient(z), jnp.arange(RECORDED))[0]


def predict(p: Any, settings: Any, windows: Array, step: Any = 0, loop: Any = loop) -> Array:
    """Return the negative log-probability of each next character, `(batch, length)`."""
    e = norm(layer(p["embed.weight"][windows[:, :-1]] + p["place"], part(p, "prelude.")))
    z = loop(part(p, "deq.cell."), settings, e, step)
    return cross_entropy(linear(p, "read", norm(layer(z, part(p, "coda.")))), windows[:, 1:])


def loss(p: Any, settings: Any, windows: Array, step: Array, loop: Any = loop) -> Array:
    return predict(p, settings, windows, step, loop).mean()
