"""The equilibrium transformer in JAX. The cache has a fixed size, so that all new tokens run one compiled program."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from model import HEADS, SETTINGS, check_length

import deqcore


class Cache(NamedTuple):
    """Keys and values at the equilibrium of the tokens so far.

    Attributes:
        keys: `(batch, length, heads, width / heads)`, of which the first `used` positions hold a token.
        values: like the keys.
        used: number of tokens.
    """

    keys: Array
    values: Array
    used: Array


def norm(z: Array) -> Array:
    """Normalise each state."""
    centred = z - z.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def split(p: Any, z: Array) -> list[Array]:
    """Return queries, keys and values `(batch, tokens, heads, width / heads)` of states `(batch, tokens, width)`."""
    mixed = z @ p["deq.cell.mix.weight"].T
    return [part.reshape(*z.shape[:2], HEADS, -1) for part in jnp.split(mixed, 3, axis=-1)]


def block(p: Any, z: Array, x: Array, attended: Array) -> Array:
    """Return the next states from the attention's `(batch, tokens, heads, width / heads)`."""
    heard = norm(x + z / 2 + attended.reshape(z.shape) @ p["deq.cell.out.weight"].T)
    thought = jax.nn.relu(heard @ p["deq.cell.first.weight"].T + p["deq.cell.first.bias"])
    return norm(heard + thought @ p["deq.cell.second.weight"].T)


def cell(z: Array, p: Any, x: Array) -> Array:
    """Update the states of all positions."""
    return block(p, z, x, jax.nn.dot_product_attention(*split(p, z), is_causal=True))


def cell_of_one(z: Array, p: Any, x: Array, cache: Cache) -> Array:
    """Update the state `(batch, 1, width)` of one new token, which sees the tokens in the cache and itself."""
    query, key, value = split(p, z)
    keys = lax.dynamic_update_slice_in_dim(cache.keys, key, cache.used, axis=1)
    values = lax.dynamic_update_slice_in_dim(cache.values, value, cache.used, axis=1)
    seen = jnp.arange(keys.shape[1]) <= cache.used
    return block(p, z, x, jax.nn.dot_product_attention(query, keys, values, mask=seen[None, None, None]))


def prompt(settings: dict[str, Any], p: Any, tokens: Array, count: Array) -> tuple[Array, Array, Cache]:
    """Solve for all positions of `tokens` `(batch, length)`, of which `count` hold a token.

    Returns:
        The logits after the last token `(batch, words)`, the steps of each sequence, and the cache.
    """
    x = p["embed.weight"][tokens] + p["place"]
    solution = deqcore.fixed_point(cell, jnp.zeros_like(x), p, x, **settings)
    _, keys, values = split(p, solution.value)
    last = lax.dynamic_index_in_dim(solution.value, count - 1, axis=1, keepdims=False)
    return last @ p["read.weight"].T + p["read.bias"], solution.steps, Cache(keys, values, count)


def extend(settings: dict[str, Any], p: Any, token: Array, cache: Cache) -> tuple[Array, Array, Cache]:
    """Solve for one new token `(batch,)` after those in the cache, and add it; see `prompt`."""
    x = (p["embed.weight"][token] + p["place"][cache.used])[:, None]
    solution = deqcore.fixed_point(cell_of_one, jnp.zeros_like(x), p, x, cache, **settings)
    _, key, value = split(p, solution.value)
    keys = lax.dynamic_update_slice_in_dim(cache.keys, key, cache.used, axis=1)
    values = lax.dynamic_update_slice_in_dim(cache.values, value, cache.used, axis=1)
    logits = solution.value[:, 0] @ p["read.weight"].T + p["read.bias"]
    return logits, solution.steps, Cache(keys, values, cache.used + 1)


class Model:
    """Weights under the names of `model.weights`, and the settings of the solves."""

    def __init__(self, weights: dict[str, Any], **settings: Any) -> None:
        self.p = {name: jnp.asarray(value) for name, value in weights.items()}
        self._prompt = jax.jit(partial(prompt, SETTINGS | settings))
        self._extend = jax.jit(partial(extend, SETTINGS | settings))
        self.length = self.p["place"].shape[0]

    def begin(self, tokens: Array) -> tuple[Array, Array, Cache]:
        """Return what `prompt` does, for `tokens` `(batch, count)`.

        Raises:
            ValueError: there are more tokens than positions.
        """
        check_length(tokens.shape[1], self.length)
        padded = jnp.pad(tokens, ((0, 0), (0, self.length - tokens.shape[1])))  # what follows changes nothing before it
        return self._prompt(self.p, padded, jnp.asarray(tokens.shape[1]))

    def extend(self, token: Array, cache: Cache) -> tuple[Array, Array, Cache]:
        """Return what `extend` does, for one more token `(batch,)`.

        Raises:
            ValueError: the cache is full.
        """
        check_length(int(cache.used) + 1, self.length)
        return self._extend(self.p, token, cache)

    def generate(self, tokens: Array, count: int) -> tuple[Array, list[Array]]:
        """Return `tokens` with the `count` most probable next ones, and the steps that each new token took.

        Raises:
            ValueError: there are more tokens than positions.
        """
        check_length(tokens.shape[1] + count, self.length)
        logits, taken, cache = self.begin(tokens)
        new, steps = [logits.argmax(-1)], [taken]
        for _ in range(count - 1):
            logits, taken, cache = self._extend(self.p, new[-1], cache)
            new.append(logits.argmax(-1))
            steps.append(taken)
        return jnp.concatenate([tokens, jnp.stack(new, axis=1)], axis=1), steps

    def recompute(self, tokens: Array, count: int) -> Array:
        """Return what `generate` does by a solve of all positions for each new token."""
        for _ in range(count):
            tokens = jnp.concatenate([tokens, self.begin(tokens)[0].argmax(-1)[:, None]], axis=1)
        return tokens
