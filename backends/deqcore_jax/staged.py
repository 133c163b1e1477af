"""A function of f and data that is compiled once for many calls; see `deqcore.abc.autodiff.Autodiff.staged`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax

from deqcore.types import Map, Tree
from deqcore_jax.closure import Program, is_array, trace
from deqcore_jax.jit_context import precise


def staged(
    f: Callable[..., jax.Array], z0: jax.Array, args: tuple[Tree, ...], body: Callable[..., Tree]
) -> Callable[..., Tree]:
    """Trace f once; the program of equal f and `body` is compiled once in the process."""
    program, leaves = trace(f, z0, args)
    closed = leaves[: len(leaves) - sum(map(is_array, jax.tree.leaves(args)))]
    return partial(_run, program, body, closed)


@partial(jax.jit, static_argnums=(0, 1))
def _run(program: Program, body: Callable[..., Tree], closed: list[jax.Array], *data: Tree) -> Tree:
    def bind(args: Tree) -> Map:
        arrays = [leaf for leaf in jax.tree.leaves(args) if is_array(leaf)]
        return lambda z: program(z, [*closed, *arrays])

    with precise():
        return body(bind, *data)
