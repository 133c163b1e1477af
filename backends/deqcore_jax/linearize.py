"""f linearised once at z*: products with J, with its transpose, and with the derivatives of the leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from deqcore.backend import Map
from deqcore.errors import StrategyError
from deqcore_jax.program import Program


class Linear:
    """df = J dz + Σ_i (∂f/∂leaf_i) dleaf_i.

    Products with J are traced here, once, however often a strategy calls them: transposing is not free.

    Attributes:
        push: J v for `v` `(batch, n)`.
        pull: Jᵀu for `u` `(batch, n)`.

    Args:
        program: f.
        z: where, `(batch, n)`.
        leaves: the other inputs of f.
        moved: positions of the leaves that may move.
        products: whether products with J are wanted; without them z is held fixed.
    """

    push: Map
    pull: Map

    def __init__(self, program: Program, z: Any, leaves: list[Any], moved: list[int], *, products: bool = True) -> None:
        self.z = z
        self.moved = [leaves[i] for i in moved]

        def f(z: Any, *at: Any) -> Any:
            merged = list(leaves)
            for i, leaf in zip(moved, at, strict=True):
                merged[i] = leaf
            return program(z, merged)

        if not products:
            only = jax.linearize(lambda *at: f(z, *at), *self.moved)[1]
            self._linear = lambda _, *d: only(*d)
            self.push = self.pull = _missing
            return
        self._linear = jax.linearize(f, z, *self.moved)[1]
        zeros = [jnp.zeros_like(leaf) for leaf in self.moved]

        # The derivative of the linear map in its first argument only: the leaves' part of it drops out.
        def push(v: Any) -> Any:
            return jax.jvp(lambda dz: self._linear(dz, *zeros), (jnp.zeros_like(v),), (v,))[1]

        self.push = _traced(push, z)
        transposed = jax.linear_transpose(self.push, z)
        self.pull = _traced(lambda u: transposed(u)[0], z)

    def push_leaves(self, d: list[Any]) -> Any:
        """Σ_i (∂f/∂leaf_i) d_i, `(batch, n)`."""
        zeros = [jnp.zeros_like(leaf) for leaf in self.moved]
        return jax.jvp(lambda *d: self._linear(jnp.zeros_like(self.z), *d), zeros, d)[1]

    def pull_leaves(self, u: Any) -> list[Any]:
        """(∂f/∂leaf_i)ᵀ u for each leaf that moves."""
        return list(jax.linear_transpose(lambda *d: self.push_leaves(list(d)), *self.moved)(u))


def _traced(f: Map, example: Any) -> Map:
    closed = jax.make_jaxpr(f)(example)
    return lambda x: core.jaxpr_as_fun(closed)(x)[0]


def _missing(_: Any) -> Any:
    raise StrategyError("The strategy called pull, although its uses_pull() says that it does not.")
