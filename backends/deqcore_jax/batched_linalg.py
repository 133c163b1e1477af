"""Small systems in plain array operations.

LAPACK can deadlock here: jaxlib 0.10 splits a batch over the threads of XLA's own pool and waits for them, on a thread
of that pool. If as many calls wait as the pool has threads (several in one program, or several devices of one host),
none ever ends: tests/backends/test_jax_ends.py, tests/scale/test_jax_sharding.py. The cost of the methods here is in
docs/notes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

UNROLLED: Final = 8
"""Systems of at most this many unknowns are eliminated without a loop."""

SQUARINGS: Final = 7
"""Number of squarings of a matrix to find its norm: the power 2^7 leaves an error below half a percent."""

T = TypeVar("T")
Solve: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def solve(a: jax.Array, b: jax.Array) -> jax.Array:
    """Solve `a` `(batch, k, k)` for `b` `(batch, k)` or `(batch, k, r)`.

    A singular system gives non-finite numbers in its own row.
    """
    return _solved(a, b, _eliminate, lambda a, y: _eliminate(jnp.swapaxes(a, 1, 2), y))


def solve_upper(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `solve` for upper triangular `a`: back substitution by halves, without a loop."""

    def transposed(a: jax.Array, y: jax.Array) -> jax.Array:
        turned = jnp.flip(jnp.swapaxes(a, 1, 2), (1, 2))  # upper triangular again
        return jnp.flip(_substitute(turned, jnp.flip(y, 1)), 1)

    return _solved(a, b, _substitute, transposed)


def solve_positive(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return `solve` for symmetric positive definite `a`: elimination without pivots."""
    return _solved(a, b, _eliminate_in_order, _eliminate_in_order)


def _solved(a: jax.Array, b: jax.Array, method: Solve, transposed: Solve) -> jax.Array:
    """Return `method(a, b)`, differentiated as the solution of a linear system and not through the method."""
    if b.ndim == 2:
        return _solved(a, b[..., None], method, transposed)[..., 0]
    if 0 in b.shape:
        return b
    still = lax.stop_gradient(a)
    return lax.custom_linear_solve(
        lambda x: jnp.matmul(a, x), b, lambda _, y: method(still, y), lambda _, y: transposed(still, y)
    )


def _repeat(count: int, step: Callable[[jax.Array, T], T], carry: T) -> T:
    """Return `step(i, carry)` for i below `count`: a loop where there are many."""
    if count > UNROLLED:
        return lax.fori_loop(0, count, step, carry)
    for i in range(count):
        carry = step(i, carry)
    return carry


def _substitute(a: jax.Array, b: jax.Array) -> jax.Array:
    k = a.shape[1]
    if k <= UNROLLED:
        solved: list[jax.Array] = []
        for i in reversed(range(k)):
            solved.insert(0, b[:, i : i + 1] / a[:, i : i + 1, i : i + 1])
            b = b[:, :i] - a[:, :i, i : i + 1] * solved[0]
        return jnp.concatenate(solved, axis=1)
    h = k // 2
    below = _substitute(a[:, h:, h:], b[:, h:])
    above = _substitute(a[:, :h, :h], b[:, :h] - jnp.matmul(a[:, :h, h:], below))
    return jnp.concatenate([above, below], axis=1)


def _inverse_upper(a: jax.Array) -> jax.Array:
    """Return the inverse of triangular `a` from the inverses of its diagonal blocks, which are computed together.

    It compiles in half the time of `_substitute` with the identity, and runs at the same speed.
    """
    k, size = a.shape[1], UNROLLED
    count = -(-k // size)
    more = count * size - k  # unknowns of their own, to fill the last block
    a = jnp.pad(a, ((0, 0), (0, more), (0, more))) + jnp.diag(jnp.arange(k + more) >= k).astype(a.dtype)
    starts = range(0, k + more, size)
    diagonal = jnp.stack([a[:, i : i + size, i : i + size] for i in starts])
    eye = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), diagonal.shape)
    inverse, *blocks = reversed(tuple(jax.vmap(_substitute)(diagonal, eye)))  # the batch may lie on several devices
    for block in blocks:
        i = k + more - inverse.shape[1] - size
        beside = -jnp.matmul(block, jnp.matmul(a[:, i : i + size, i + size :], inverse))
        below = jnp.pad(inverse, ((0, 0), (0, 0), (size, 0)))
        inverse = jnp.concatenate([jnp.concatenate([block, beside], axis=2), below], axis=1)
    return inverse[:, :k, :k]


def _eliminate_in_order(a: jax.Array, b: jax.Array) -> jax.Array:
    k = a.shape[1]
    rows = jnp.arange(k, dtype=jnp.int32)[None, :, None]

    def step(i: jax.Array, m: jax.Array) -> jax.Array:
        row = lax.dynamic_slice_in_dim(m, i, 1, 1)  # (batch, 1, k + r)
        row = row / lax.dynamic_slice_in_dim(row, i, 1, 2)
        return jnp.where(rows == i, row, m - lax.dynamic_slice_in_dim(m, i, 1, 2) * row)

    return _repeat(k, step, jnp.concatenate([a, b], axis=2))[:, :, k:]


def _eliminate(a: jax.Array, b: jax.Array) -> jax.Array:
    """Eliminate with partial pivoting without exchanges: an unknown takes the best row that is still free."""
    k = a.shape[1]
    rows = jnp.arange(k, dtype=jnp.int32)[None, :]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        m, owner = carry  # owner: which unknown took a row, k where none did
        column = lax.dynamic_slice_in_dim(m, i, 1, 2)  # (batch, k, 1)
        size = jnp.where(owner == k, jnp.abs(column[:, :, 0]), -1)
        chosen = rows == jnp.argmax(size, axis=1).astype(jnp.int32)[:, None]
        pivot = jnp.sum(jnp.where(chosen[:, :, None], m, 0), axis=1, keepdims=True)  # (batch, 1, k + r)
        pivot = pivot / lax.dynamic_slice_in_dim(pivot, i, 1, 2)
        m = jnp.where(chosen[:, :, None], pivot, m - column * pivot)
        return m, jnp.where(chosen, i, owner)

    nobody = jnp.full_like(a, k, jnp.int32, shape=a.shape[:2])
    m, owner = _repeat(k, step, (jnp.concatenate([a, b], axis=2), nobody))
    owns = owner[:, None, :] == jnp.arange(k, dtype=jnp.int32)[None, :, None]  # (batch, unknown, row)
    order = jnp.sum(jnp.where(owns, rows[:, None, :], 0), axis=2)
    return jnp.take_along_axis(m[:, :, k:], order[:, :, None], axis=1)


def least_singular_value(a: jax.Array, columns: jax.Array | None = None) -> jax.Array:
    """Return 1/‖R^-1‖ of `a` `(batch, m, k)` = Q R, zero where R is singular.

    If `columns` says that only few columns are in use (see `SmallLinalg.least_singular_value`), only these are read.

    The norm of R^-1 is the square root of the largest eigenvalue of its Gram matrix, which rounding does not hurt (the
    Gram matrix of `a` would lose the smallest one). Repeated squaring leaves only the part in that eigenvector.
    """
    if columns is not None and a.shape[2] > 2 * UNROLLED:
        few = a[:, : UNROLLED + 1, :UNROLLED]
        return lax.cond(columns <= UNROLLED, lambda: least_singular_value(few), lambda: least_singular_value(a))
    inverse = _inverse_upper(_triangle(a))
    scale = jnp.max(jnp.abs(inverse), axis=(1, 2), keepdims=True)
    gram = jnp.matmul(inverse / scale, jnp.swapaxes(inverse / scale, 1, 2))
    power = gram
    for _ in range(SQUARINGS):
        power = power / jnp.trace(power, axis1=1, axis2=2)[:, None, None]
        power = jnp.matmul(power, power)
    column = jnp.argmax(jnp.sum(power * power, axis=1), axis=1)
    v = jnp.take_along_axis(power, column[:, None, None], axis=2)[:, :, 0]
    along = jnp.sum(v * jnp.matmul(gram, v[:, :, None])[:, :, 0], axis=1) / jnp.sum(v * v, axis=1)
    norm = scale[:, 0, 0] * jnp.sqrt(along)
    return jnp.where(jnp.isfinite(norm), 1.0 / norm, jnp.zeros_like(norm))


def _triangle(a: jax.Array) -> jax.Array:
    """Return R of `a` = Q R by the modified Gram-Schmidt process: as good as Householder's where Q is not wanted."""
    k = a.shape[2]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rest, r = carry
        column = lax.dynamic_slice_in_dim(rest, i, 1, 2)  # (batch, m, 1)
        length = jnp.sqrt(jnp.sum(column * column, axis=1, keepdims=True))
        q = column / jnp.where(length > 0, length, jnp.ones_like(length))
        row = jnp.matmul(jnp.swapaxes(q, 1, 2), rest)  # (batch, 1, k), zero to the left of i except for rounding
        row = jnp.where(jnp.arange(k, dtype=jnp.int32)[None, None, :] < i, jnp.zeros_like(row), row)
        return rest - q * row, lax.dynamic_update_slice_in_dim(r, row, i, 1)

    return _repeat(k, step, (a, jnp.zeros_like(a, shape=(a.shape[0], k, k))))[1]
