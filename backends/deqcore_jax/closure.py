"""The user's f as a pure function of arrays: traced once, used for the solve and for its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from deqcore.errors import ProblemError
from deqcore.types import Tree
from deqcore_jax.jit_cache import intern

UNTRACEABLE: Final = (
    jax.errors.ConcretizationTypeError,  # also of a branch
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@dataclass(frozen=True)
class Program:
    """f as a jaxpr `(*leaves, z) -> f(z)`. Two are equal if they have the same jaxpr.

    Leaves are the arrays that f closes over, and those of its arguments.
    """

    jaxpr: core.Jaxpr

    def __call__(self, z: jax.Array, leaves: list[jax.Array]) -> jax.Array:
        """Evaluate f at `z` `(batch, n)`."""
        (fz,) = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, ()))(*leaves, z)
        return lax.convert_element_type(fz, z.dtype)  # a weak type would change the loop's carry

    def calls(self, primitive: str) -> bool:
        """Return whether f, or a function inside it, calls a primitive whose name begins like this.

        The derivative of a `jax.custom_jvp` function is its rule, so that what the function calls does not count.
        """
        return calls(self.jaxpr, primitive)

    @property
    def reverse_only(self) -> bool:
        """Whether f calls a `jax.custom_vjp` function: JAX gives it no forward mode."""
        return self.calls("custom_vjp_call")


def trace(f: Callable[..., jax.Array], z0: jax.Array, args: tuple[Tree, ...]) -> tuple[Program, list[jax.Array]]:
    """Call f once, on tracers.

    Args:
        f: `f(z, *args)` on `(batch, n)`.
        z0: a state `(batch, n)`.
        args: any trees. Arrays become inputs of the program; everything else is part of it.

    Returns:
        The program and its leaves.

    Raises:
        ProblemError: f needs the values of an array, such as for a branch.
    """
    leaves, structure = jax.tree.flatten(args)
    dynamic = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    # A new function each time: otherwise JAX would return a cached result, with the old closure of f.
    def flat(arrays: list[jax.Array], z: jax.Array) -> jax.Array:
        merged = list(leaves)
        for i, array in zip(dynamic, arrays, strict=True):
            merged[i] = array
        return f(z, *jax.tree.unflatten(structure, merged))

    arrays = [leaves[i] for i in dynamic]
    try:
        closed = jax.make_jaxpr(flat)(arrays, z0)
    except UNTRACEABLE as error:
        raise ProblemError(
            f"f must be traceable by JAX, but it needs the values of an array "
            f"({str(error).partition(chr(10))[0].rstrip('.')}). Write branches on values with jnp.where or "
            f"jax.lax.cond, loops with jax.lax.fori_loop or jax.lax.scan, and masks with jnp.where. To debug f with "
            f"values, run under jax.disable_jit()."
        ) from error
    jaxpr = closed.jaxpr
    program_inputs = [*closed.consts, *arrays]
    pure = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    first = intern(pure, rules=is_traced(program_inputs))
    return Program(first), [leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in program_inputs]


def calls(value: object, primitive: str) -> bool:
    """Return `Program.calls` for a jaxpr, or for anything that contains jaxprs."""
    if isinstance(value, core.ClosedJaxpr):
        return calls(value.jaxpr, primitive)
    if isinstance(value, tuple | list):
        return any(calls(item, primitive) for item in value)
    if not isinstance(value, core.Jaxpr):
        return False
    names = [eqn.primitive.name for eqn in value.eqns]
    inside = [list(e.params.values()) for e in value.eqns if not e.primitive.name.startswith("custom_jvp_call")]
    return any(name.startswith(primitive) for name in names) or calls(inside, primitive)


def is_array(leaf: object) -> bool:
    """Return whether a leaf is an array of JAX or NumPy; numbers and everything else belong to the program."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def is_traced(leaves: Tree) -> bool:
    """Return whether a transformation traces any of these leaves."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(leaves))


def is_differentiable(leaf: jax.Array) -> bool:
    """Return whether gradients for this array exist."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))
