"""Small systems by Gauss-Jordan elimination in plain array operations.

LAPACK's batched LU is no choice here: with jaxlib 0.10 on a CPU, a compiled gradient that calls it more than once may
never end (tests/backends/test_jax_ends.py), and its pivots had to be made a permutation by a loop of their own.
Elimination is one pass over the matrices for each unknown: see docs/design.md for what it costs.
"""

from __future__ import annotations

from typing import Any, Final

import jax.numpy as jnp
from jax import lax

UNROLLED: Final = 8
"""Systems of at most so many unknowns are eliminated without a loop."""


def solve(a: Any, b: Any) -> Any:
    """Solve `a` `(batch, k, k)` for `b` `(batch, k, r)`. A singular system gives non-finite numbers in its own row."""
    if 0 in b.shape:
        return b
    transposed = jnp.swapaxes(lax.stop_gradient(a), 1, 2)
    found: Any = lax.custom_linear_solve(
        lambda x: jnp.matmul(a, x), b, lambda _, y: _eliminate(a, y), lambda _, y: _eliminate(transposed, y)
    )
    return found


def _eliminate(a: Any, b: Any) -> Any:
    """Partial pivoting without exchanges: an unknown takes the best row that no unknown before it took."""
    k = a.shape[1]
    rows = jnp.arange(k, dtype=jnp.int32)[None, :]

    def step(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        m, owner = carry  # owner: which unknown took a row, k where none did
        column = lax.dynamic_slice_in_dim(m, i, 1, 2)  # (batch, k, 1)
        size = jnp.where(owner == k, jnp.abs(column[:, :, 0]), -1)
        chosen = rows == jnp.argmax(size, axis=1).astype(jnp.int32)[:, None]
        pivot = jnp.sum(jnp.where(chosen[:, :, None], m, 0), axis=1, keepdims=True)  # (batch, 1, k + r)
        pivot = pivot / lax.dynamic_slice_in_dim(pivot, i, 1, 2)
        m = jnp.where(chosen[:, :, None], pivot, m - column * pivot)
        return m, jnp.where(chosen, i, owner)

    carry = jnp.concatenate([a, b], axis=2), jnp.full(a.shape[:2], k, jnp.int32)
    if k <= UNROLLED:
        for i in range(k):
            carry = step(i, carry)
    else:
        carry = lax.fori_loop(0, k, step, carry)
    m, owner = carry
    mine = owner[:, None, :] == jnp.arange(k, dtype=jnp.int32)[None, :, None]  # (batch, unknown, row)
    order = jnp.sum(jnp.where(mine, rows[:, None, :], 0), axis=2)
    return jnp.take_along_axis(m[:, :, k:], order[:, :, None], axis=1)
