"""The small least-squares problem of a Krylov space, by loops over the dimensions in use.

Unrolled code for all 40 columns takes seconds to compile and reads all of them in every check. These loops touch one
row of `(batch, m)` a step, and end with the dimension of the space.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from deqcore.abc.kernels import Krylov

SWEEPS: Final = 40
"""Steps of inverse iteration at most."""

SETTLED: Final = 1e-3
"""Relative change of its result at which inverse iteration ends, when all samples are there."""

Sweep: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def least_squares(space: Krylov, inverse: bool) -> tuple[jax.Array, ...]:
    """See `deqcore.abc.kernels.FusedKernels.least_squares`."""
    m = space.columns.history_size
    both = space.columns.masked(None).vectors()  # (batch, m, 2 (m + 1)): row j holds column j of H̄, then its source
    columns, sources = both[:, :, : m + 1], both[:, :, m + 1 :]
    squares = jnp.sum(columns * columns, axis=2)
    missing = squares == 0  # columns that a sample did not reach
    y = _minimiser(space, columns, missing)
    square = jnp.sum(y * y, axis=1)
    size = jnp.sqrt(square)
    norm = jnp.ones_like(size)
    if inverse:
        norm = _inverse_norm(columns, missing, squares, y + 1e-3 * size[:, None], space.dimension)
    coefficients = jnp.sum(y[:, :, None] * sources, axis=1)
    return coefficients, size, norm, jnp.sqrt(jnp.max(squares, axis=1)), *_falls(space.null_vector, missing)


def _minimiser(space: Krylov, columns: jax.Array, missing: jax.Array) -> jax.Array:
    """Return y `(batch, m)` by back substitution, see `KrylovSpace._coefficients`."""
    side = -space.null_vector[:, 1:] * (space.null_vector[:, 0] / space.null_norm_sq)[:, None]
    index, last = jnp.arange(missing.shape[1], dtype=jnp.int32)[None, :], space.dimension - 1
    none = jnp.zeros((), side.dtype)

    def step(i: jax.Array, y: jax.Array) -> jax.Array:
        column = lax.dynamic_index_in_dim(columns, last - i, 1, keepdims=False)[:, 1:]
        entry = jnp.where(_entry(missing, last - i), none, _entry(y, last - i) / _entry(column, last - i))
        return jnp.where(index == last - i, entry, y - entry * column)

    y = lax.fori_loop(0, space.dimension, step, jnp.where(missing, none, side))
    return jnp.where(jnp.isfinite(y), y, none)


def _inverse_norm(
    columns: jax.Array, missing: jax.Array, squares: jax.Array, start: jax.Array, dimension: jax.Array
) -> jax.Array:
    """Return 1/σ_min(H̄) `(batch,)` by inverse iteration from `start` with R of H̄ = Q R; 1 without a column."""
    total = jnp.sum(squares, axis=1)
    r = _triangle(columns, missing, jnp.sqrt(total), dimension)
    index = jnp.arange(missing.shape[1], dtype=jnp.int32)[None, :]

    def lower(i: jax.Array, x: jax.Array) -> jax.Array:
        row = lax.dynamic_index_in_dim(r, i, 1, keepdims=False)
        entry = _entry(x, i) / _entry(row, i)
        return jnp.where(index == i, entry, x - entry * row)

    def upper(i: jax.Array, x: jax.Array) -> jax.Array:
        i = dimension - 1 - i
        row = lax.dynamic_index_in_dim(r, i, 1, keepdims=False)
        rest = jnp.sum(jnp.where(index > i, row * x, jnp.zeros((), x.dtype)), axis=1, keepdims=True)
        return jnp.where(index == i, (x - rest) / _entry(row, i), x)

    def sweep(state: Sweep) -> Sweep:
        count, _, after, x = state
        x = lax.fori_loop(0, dimension, upper, lax.fori_loop(0, dimension, lower, x / after[:, None]))
        return count + 1, after, _length(x), x

    def goes_on(state: Sweep) -> jax.Array:
        count, before, after, _ = state
        moving = (jnp.abs(after - before) > SETTLED * after) & jnp.isfinite(after)
        return (count < SWEEPS) & ((count < 2) | jnp.any(moving))

    x = jnp.where(index < dimension, start, jnp.zeros((), start.dtype))
    square = lax.while_loop(goes_on, sweep, (jnp.int32(0), jnp.ones_like(total), _length(x), x))[2]
    norm = jnp.where(jnp.isfinite(square), jnp.sqrt(square), jnp.full_like(square, jnp.inf))
    norm = jnp.where(total == 0, jnp.ones_like(norm), norm)
    return jnp.where(jnp.isfinite(total), norm, jnp.full_like(norm, jnp.nan))


def _triangle(columns: jax.Array, missing: jax.Array, fill: jax.Array, dimension: jax.Array) -> jax.Array:
    """Return R `(batch, m, m)` of H̄ = Q R by Givens rotations, with `fill` `(batch,)` for columns that are missing.

    Column j without an entry goes with slot j + 1 without a vector: what is there keeps its singular values.
    """
    filled = jnp.where(missing, fill[:, None], jnp.zeros((), fill.dtype))
    index = jnp.arange(missing.shape[1], dtype=jnp.int32)[None, :]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        r, row = carry
        below = lax.dynamic_index_in_dim(columns, i + 1, 2, keepdims=False)
        below = jnp.where(index == i, below + filled, below)
        a, b = _entry(row, i), _entry(below, i)
        length = jnp.sqrt(a * a + b * b)
        c, s = a / length, b / length
        return lax.dynamic_update_index_in_dim(r, c * row + s * below, i, 1), c * below - s * row

    start = jnp.zeros_like(columns[:, :, 1:]), columns[:, :, 0]
    return lax.fori_loop(0, dimension, step, start)[0]


def _falls(null_vector: jax.Array, missing: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return `latest` and `best` of `LeastSquares`, see `KrylovSpace._falls`."""
    m = missing.shape[1]
    index = jnp.arange(m, dtype=jnp.int32)
    upper = jnp.triu(jnp.ones_like(null_vector, shape=(m + 1, m + 1)))
    squares = jnp.matmul(null_vector * null_vector, upper)  # ‖ν‖² after each column
    last = index == jnp.max(jnp.where(missing, -1, index), axis=1, keepdims=True)
    one = jnp.ones_like(squares[:, 1:])
    ratio = jnp.where(missing, one, jnp.sqrt(squares[:, :-1] / squares[:, 1:]))
    return jnp.min(jnp.where(last, ratio, one), axis=1), jnp.min(jnp.where(last, one, ratio), axis=1)


def _entry(rows: jax.Array, i: jax.Array) -> jax.Array:
    """Return column i of `rows`, `(batch, 1)`."""
    return lax.dynamic_slice_in_dim(rows, i, 1, axis=1)


def _length(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=1))
