"""Small systems by LU, without the loop in which JAX turns pivots into a permutation on CPUs.

That loop has a step per row and stands in every compiled gradient beside the two that solve something.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax


def solve(a: Any, b: Any) -> Any:
    """Solve `a` `(batch, k, k)` for `b` `(batch, k, r)`. A singular system gives non-finite numbers in its own row."""
    if 0 in b.shape:
        return b
    lu, pivots, _ = lax.linalg.lu(a)
    ordered = jnp.take_along_axis(b, _permutation(pivots)[:, :, None], axis=1)
    lower = lax.linalg.triangular_solve(lu, ordered, left_side=True, lower=True, unit_diagonal=True)
    return lax.linalg.triangular_solve(lu, lower, left_side=True)


def _permutation(pivots: Any) -> Any:
    """The order of rows that the swaps `(batch, k)` leave behind: they are composed pairwise, log k times."""
    batch, k = pivots.shape
    rows = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32)[None, None, :], (batch, k, k))
    step = jnp.arange(k, dtype=jnp.int32)[None, :, None]
    target = pivots[:, :, None]
    swaps = jnp.where(rows == step, target, jnp.where(rows == target, step, rows))  # (batch, swap, row)
    while swaps.shape[1] > 1:
        if swaps.shape[1] % 2:
            swaps = jnp.concatenate([swaps, rows[:, :1]], axis=1)
        swaps = jnp.take_along_axis(swaps[:, ::2], swaps[:, 1::2], axis=2)
    return swaps[:, 0]
