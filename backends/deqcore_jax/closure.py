"""The user's f as a pure function of arrays: traced once, used for the solve and for its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from deqcore_jax.jit_cache import intern


@dataclass(frozen=True)
class Program:
    """f as a jaxpr `(*leaves, z) -> f(z)`. Equal to another one if it is the same jaxpr.

    Leaves are the arrays that f closes over, and those of its arguments.
    """

    jaxpr: core.Jaxpr

    def __call__(self, z: Any, leaves: list[Any]) -> Any:
        """Evaluate f at `z` `(batch, n)`."""
        (fz,) = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, ()))(*leaves, z)
        return lax.convert_element_type(fz, z.dtype)  # a weak type would change the loop's carry

    def calls(self, primitive: str) -> bool:
        """Whether f, or a function inside it, calls a primitive whose name begins like this.

        The derivative of a `jax.custom_jvp` function is its rule, so that what the function calls does not count.
        """
        return calls(self.jaxpr, primitive)

    @property
    def reverse_only(self) -> bool:
        """Whether f calls a `jax.custom_vjp` function: JAX gives it no forward mode."""
        return self.calls("custom_vjp_call")


def trace(f: Callable[..., Any], z0: Any, args: tuple[Any, ...]) -> tuple[Program, list[Any]]:
    """Call f once, on tracers.

    Args:
        f: `f(z, *args)` on `(batch, n)`.
        z0: a state `(batch, n)`.
        args: any trees. Arrays become inputs of the program; everything else is part of it.

    Returns:
        The program and its leaves.
    """
    leaves, structure = jax.tree.flatten(args)
    dynamic = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    # A new function each time: JAX would otherwise answer from a cache, with what f closed over before.
    def flat(arrays: list[Any], z: Any) -> Any:
        merged = list(leaves)
        for i, array in zip(dynamic, arrays, strict=True):
            merged[i] = array
        return f(z, *jax.tree.unflatten(structure, merged))

    arrays = [leaves[i] for i in dynamic]
    closed = jax.make_jaxpr(flat)(arrays, z0)
    jaxpr = closed.jaxpr
    found = [*closed.consts, *arrays]
    pure = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    first = intern(pure, rules=is_traced(found))
    return Program(first), [leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in found]


def calls(value: Any, primitive: str) -> bool:
    """`Program.calls` for a jaxpr, or for anything that holds some."""
    if isinstance(value, core.ClosedJaxpr):
        return calls(value.jaxpr, primitive)
    if isinstance(value, tuple | list):
        return any(calls(each, primitive) for each in value)
    if not isinstance(value, core.Jaxpr):
        return False
    names = [eqn.primitive.name for eqn in value.eqns]
    inside = [list(e.params.values()) for e in value.eqns if not e.primitive.name.startswith("custom_jvp_call")]
    return any(name.startswith(primitive) for name in names) or calls(inside, primitive)


def is_array(leaf: object) -> bool:
    """Arrays of JAX and of NumPy; numbers and everything else belong to the program."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def is_traced(leaves: Any) -> bool:
    """Whether a transformation is looking at any of these leaves."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(leaves))


def is_differentiable(leaf: Any) -> bool:
    """Whether gradients for this array exist."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
