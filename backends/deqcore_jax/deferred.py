"""A function that JAX traces where its value is computed, and not where it is called.

`lax.custom_linear_solve` traces the solve and that of the transpose, of which a program needs one. Tracing the other
is a seventh of the work to trace a gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.extend import core
from jax.interpreters import batching, mlir

from deqcore.types import Tree


def deferred(function: Callable[..., jax.Array], first: jax.Array, *operands: Tree) -> jax.Array:
    """Return `function(first, *operands)`, an array of the shape and dtype of `first`.

    The function is called while a program that needs the value is compiled, and for each transformation by `vmap`. It
    has no derivative.

    Args:
        function: reads no traced value but its operands, and has no effects.
        first: an array.
        operands: trees of arrays.
    """
    leaves, structure = jax.tree.flatten(operands)

    def call(first: jax.Array, *leaves: jax.Array) -> jax.Array:
        return function(first, *jax.tree.unflatten(structure, leaves))

    value: jax.Array = _deferred.bind(first, *leaves, call=call)
    return value


def _call(*leaves: jax.Array, call: Callable[..., jax.Array]) -> jax.Array:
    return call(*leaves)


def _batched(
    leaves: tuple[jax.Array, ...], axes: tuple[int | None, ...], *, call: Callable[..., jax.Array]
) -> tuple[jax.Array, int]:
    return jax.vmap(call, in_axes=axes)(*leaves), 0


_deferred = core.Primitive("deqcore_deferred")
_deferred.def_impl(_call)
_deferred.def_abstract_eval(lambda first, *_, call: first)
batching.primitive_batchers[_deferred] = _batched
mlir.register_lowering(_deferred, mlir.lower_fun(_call, multiple_results=False), cacheable=False)
