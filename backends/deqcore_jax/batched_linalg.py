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

from deqcore_jax.deferred import deferred

UNROLLED: Final = 2
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
        lambda x: jnp.matmul(a, x),
        b,
        lambda _, y: method(still, y),
        lambda _, y: deferred(lambda y, a: transposed(a, y), y, still),
    )


def _repeat(count: int, step: Callable[[jax.Array, T], T], carry: T) -> T:
    """Return `step(i, carry)` for i below `count`: a loop where there are many."""
    if count > UNROLLED:
        return lax.fori_loop(0, count, step, carry)
    for i in range(count):
        carry = step(i, carry)
    return carry


def _substitute(a: jax.Array, b: jax.Array) -> jax.Array:
    return _back(a, b, a.shape[1])


def _back(a: jax.Array, b: jax.Array, count: int | jax.Array) -> jax.Array:
    """Solve with the first `count` rows and columns of triangular `a`; the other rows of the result are zero."""
    rows = jnp.arange(a.shape[1], dtype=jnp.int32)[None, :, None]

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        i = jnp.asarray(count, jnp.int32) - 1 - i
        row = lax.dynamic_slice_in_dim(a, i, 1, 1)  # (batch, 1, k)
        rest = jnp.sum(jnp.where(rows > i, jnp.swapaxes(row, 1, 2) * x, jnp.zeros((), x.dtype)), axis=1, keepdims=True)
        entry = (lax.dynamic_slice_in_dim(b, i, 1, 1) - rest) / lax.dynamic_slice_in_dim(row, i, 1, 2)
        return jnp.where(rows == i, entry, x)

    return lax.fori_loop(0, count, step, jnp.zeros_like(a, shape=b.shape))  # varies over a mesh as `a` does


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

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        m, taken, order = carry  # order: the row of each unknown
        column = lax.dynamic_slice_in_dim(m, i, 1, 2)  # (batch, k, 1)
        size = jnp.where(taken, -1, jnp.abs(column[:, :, 0]))
        best = jnp.argmax(size, axis=1).astype(jnp.int32)[:, None]
        chosen = rows == best
        pivot = jnp.sum(jnp.where(chosen[:, :, None], m, 0), axis=1, keepdims=True)  # (batch, 1, k + r)
        pivot = pivot / lax.dynamic_slice_in_dim(pivot, i, 1, 2)
        m = jnp.where(chosen[:, :, None], pivot, m - column * pivot)
        return m, taken | chosen, jnp.where(rows == i, best, order)

    none = jnp.zeros_like(a, bool, shape=a.shape[:2])
    carry = jnp.concatenate([a, b], axis=2), none, none.astype(jnp.int32)
    m, _, order = _repeat(k, step, carry)
    return jnp.take_along_axis(m[:, :, k:], order[:, :, None], axis=1, mode="clip")


def least_singular_value(a: jax.Array, columns: jax.Array | int | None = None) -> jax.Array:
    """Return 1/‖R^-1‖ of `a` `(batch, m, k)` = Q R, zero where R is singular.

    If `columns` says that only few columns are in use (see `SmallLinalg.least_singular_value`), only these count.

    The norm of R^-1 is the square root of the largest eigenvalue of its Gram matrix, which rounding does not hurt (the
    Gram matrix of `a` would lose the smallest one). Repeated squaring leaves only the part in that eigenvector.
    """
    count = a.shape[2] if columns is None else columns
    eye = jnp.broadcast_to(jnp.eye(a.shape[2], dtype=a.dtype), (a.shape[0], a.shape[2], a.shape[2]))
    inverse = _back(_triangle(a, count), eye, count)
    scale = jnp.max(jnp.abs(inverse), axis=(1, 2), keepdims=True)
    gram = jnp.matmul(inverse / scale, jnp.swapaxes(inverse / scale, 1, 2))

    def squared(_: jax.Array, power: jax.Array) -> jax.Array:
        power = power / jnp.trace(power, axis1=1, axis2=2)[:, None, None]
        return jnp.matmul(power, power)

    power = lax.fori_loop(0, SQUARINGS, squared, gram)
    column = jnp.argmax(jnp.sum(power * power, axis=1), axis=1)
    v = jnp.take_along_axis(power, column[:, None, None], axis=2)[:, :, 0]
    along = jnp.sum(v * jnp.matmul(gram, v[:, :, None])[:, :, 0], axis=1) / jnp.sum(v * v, axis=1)
    norm = scale[:, 0, 0] * jnp.sqrt(along)
    return jnp.where(jnp.isfinite(norm), 1.0 / norm, jnp.zeros_like(norm))


def _triangle(a: jax.Array, count: jax.Array | int) -> jax.Array:
    """Return R of the first `count` columns of `a` = Q R by the modified Gram-Schmidt process.

    It is as good as Householder's where Q is not wanted.
    """
    k = a.shape[2]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rest, r = carry
        column = lax.dynamic_slice_in_dim(rest, i, 1, 2)  # (batch, m, 1)
        length = jnp.sqrt(jnp.sum(column * column, axis=1, keepdims=True))
        q = column / jnp.where(length > 0, length, jnp.ones_like(length))
        row = jnp.matmul(jnp.swapaxes(q, 1, 2), rest)  # (batch, 1, k), zero to the left of i except for rounding
        row = jnp.where(jnp.arange(k, dtype=jnp.int32)[None, None, :] < i, jnp.zeros_like(row), row)
        return rest - q * row, lax.dynamic_update_slice_in_dim(r, row, i, 1)

    return lax.fori_loop(0, count, step, (a, jnp.zeros_like(a, shape=(a.shape[0], k, k))))[1]
