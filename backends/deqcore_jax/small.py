"""Small systems in plain array operations.

LAPACK's batched LU is no choice here: with jaxlib 0.10 on a CPU, a compiled gradient that calls it more than once may
never end (tests/backends/test_jax_ends.py), and its pivots had to be made a permutation by a loop of their own.
What the methods here cost is in docs/design.md.
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


def solve_upper(a: Any, b: Any) -> Any:
    """`solve` for upper triangular `a`: back substitution by halves, without a loop."""
    if 0 in b.shape:
        return b
    still = lax.stop_gradient(a)
    turned = jnp.flip(jnp.swapaxes(still, 1, 2), (1, 2))  # the transpose, upper triangular again
    found: Any = lax.custom_linear_solve(
        lambda x: jnp.matmul(a, x),
        b,
        lambda _, y: _substitute(still, y),
        lambda _, y: jnp.flip(_substitute(turned, jnp.flip(y, 1)), 1),
    )
    return found


def _substitute(a: Any, b: Any) -> Any:
    k = a.shape[1]
    if k <= UNROLLED:
        found: list[Any] = []
        for i in reversed(range(k)):
            found.insert(0, b[:, i : i + 1] / a[:, i : i + 1, i : i + 1])
            b = b[:, :i] - a[:, :i, i : i + 1] * found[0]
        return jnp.concatenate(found, axis=1)
    h = k // 2
    below = _substitute(a[:, h:, h:], b[:, h:])
    above = _substitute(a[:, :h, :h], b[:, :h] - jnp.matmul(a[:, :h, h:], below))
    return jnp.concatenate([above, below], axis=1)


def solve_positive(a: Any, b: Any) -> Any:
    """`solve` for symmetric positive definite `a`: inverted by halves, most of it products of matrices."""
    if 0 in b.shape:
        return b
    inverse = _invert(lax.stop_gradient(a))
    found: Any = lax.custom_linear_solve(
        lambda x: jnp.matmul(a, x), b, lambda _, y: jnp.matmul(inverse, y), symmetric=True
    )
    return found


def _invert(a: Any) -> Any:
    """By the Schur complement, which is positive definite again; small ones by elimination without pivots."""
    k = a.shape[1]
    if k <= UNROLLED:
        m = jnp.concatenate([a, jnp.broadcast_to(jnp.eye(k, dtype=a.dtype), a.shape)], axis=2)
        for i in range(k):
            row = m[:, i : i + 1, :] / m[:, i : i + 1, i : i + 1]
            m = (m - m[:, :, i : i + 1] * row).at[:, i, :].set(row[:, 0, :])
        return m[:, :, k:]
    h = k // 2
    corner, side = _invert(a[:, :h, :h]), a[:, :h, h:]
    across = jnp.matmul(corner, side)
    rest = _invert(a[:, h:, h:] - jnp.matmul(jnp.swapaxes(side, 1, 2), across))
    right = -jnp.matmul(across, rest)
    left = corner - jnp.matmul(right, jnp.swapaxes(across, 1, 2))
    below = jnp.swapaxes(right, 1, 2)
    return jnp.concatenate([jnp.concatenate([left, right], axis=2), jnp.concatenate([below, rest], axis=2)], axis=1)


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
