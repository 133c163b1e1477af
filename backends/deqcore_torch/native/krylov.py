"""The compiled part of GMRES: see `kernels.py`, whose conventions hold here."""

from __future__ import annotations

from typing import Final

import numpy as np

from deqcore_torch.native.kernels import (
    _add,
    _component,
    _copy,
    _dot,
    _norm,
    _projected,
    _slots,
    compiled,
)


@compiled
def arnoldi(
    w, latest, basis, per_chunk, used, seen, columns, column, columns_seen, place, null_vector, null_norm_sq, residual,
    goal, can_grow, steps, waiting, twice, shifted, eps, slot, v, start, stop,
):  # fmt: skip
    """Do the part of a step of GMRES after the product `w`, for the samples that are `waiting`.

    Names and formulas are those of `deqcore.linear.gmres`; `columns` `(m, batch, 2 (m + 1))` is the only chunk, and
    `place` is the slot of `source_slot`. The space's small arrays are written in place. `v` is the memory of `slot`:
    rows that do not grow keep their latest vector there, and do not see the slot.
    """
    m = null_vector.shape[1]
    h, products = np.empty(m), np.empty(m)
    slots = np.empty(m, np.int64)
    for b in range(start, stop):
        going = taken = False
        if waiting[b]:
            rest = v[b]
            count = _slots(seen[b], used, slots)
            along = 1.0
            if shifted:
                before = _norm(w[b])
                height = _projected(basis, per_chunk, slots, count, b, w, twice, before, w[b], rest, h, products)
                h[:] = -h
                before = max(before, 1.0)
            else:
                _copy(w[b], rest)
                before = _norm(rest)
                along = _component(latest[b], rest)
                height = _projected(basis, per_chunk, slots, count, b, w, twice, _norm(rest), rest, rest, h, products)
            h[place[b]] += along
            floor = 4.0 * eps * before
            broke = height <= floor
            if broke:
                height = floor if floor > 0.0 else 1.0
            length = w.dtype.type(-height if shifted else height)
            for i in range(rest.shape[0]):
                rest[i] /= length
            overlap = _dot(null_vector[b], h)
            empty = broke and abs(overlap) <= 16.0 * floor * np.sqrt(null_norm_sq[b])
            entry = -overlap / height
            whole = null_norm_sq[b] + entry * entry
            left = residual[b] * np.sqrt(null_norm_sq[b] / whole)
            taken = np.isfinite(left) and not empty
            going = taken and not broke
            if taken:
                columns[column, b, :m] = h
                columns[column, b, slot] += height
                columns[column, b, m:] = 0.0
                columns[column, b, m + place[b]] = 1.0
                null_vector[b, slot] += entry
                null_norm_sq[b] = whole
                residual[b] = left
            place[b] = slot
            can_grow[b] = going
            steps[b] += 1
        if not going:
            _copy(latest[b], v[b])
        if not taken:
            columns[column, b] = 0.0
        seen[b, slot] = going
        columns_seen[b, column] = taken
        waiting[b] = going and residual[b] > goal[b]


@compiled
def plain_step(image, r, x, norm, rows, lengths, start, stop):
    """Write ‖image‖ for the `rows`, and add r to x where it is below `norm`."""
    one = x.dtype.type(1)
    for b in range(start, stop):
        if rows[b]:
            lengths[b] = _norm(image[b])
            if lengths[b] < norm[b]:
                _add(one, r[b], x[b])


SWEEPS: Final = 40
"""Steps of inverse iteration at most."""

SETTLED: Final = 1e-3
"""Relative change of its result at which inverse iteration ends."""


@compiled
def _upper(matrix, count, x):
    """Solve T x = x in place, for upper triangular T in the rows and columns below `count`.

    Small matrices are read by their indices: a slice takes as long as a row.
    """
    for i in range(count - 1, -1, -1):
        total = x[i]
        for j in range(i + 1, count):
            total -= matrix[i, j] * x[j]
        x[i] = total / matrix[i, i]


@compiled
def _lower(matrix, count, x):
    """Solve Tᵀ x = x in place."""
    for i in range(count):
        x[i] /= matrix[i, i]
        for j in range(i + 1, count):
            x[j] -= x[i] * matrix[i, j]


@compiled
def _normalized(x, count):
    """Divide x by its norm, and return the norm."""
    square = 0.0
    for j in range(count):
        square += x[j] * x[j]
    length = np.sqrt(square)
    for j in range(count):
        x[j] /= length
    return length


@compiled
def _small_solution(b, null_vector, columns, seen, used, null_norm_sq, work, own, coefficients):
    """Solve the small system of a sample, for β = 1.

    Write y in the slots of the basis to `coefficients`; y in columns and H̄ to the parts of `work` that
    `_inverse_norm` reads. Return the count of columns, ‖y‖, the largest norm of a column, and the latest and the best
    ratio of residuals.
    """
    m = null_vector.shape[1]
    triangle, r, (y, _) = work
    for k in range(m):
        coefficients[k] = 0.0
    count = 0
    for j in range(used):
        if seen[b, j]:
            own[count] = j
            count += 1
    largest, latest, best = 0.0, 1.0, 1.0
    square = null_vector[b, 0] * null_vector[b, 0]
    for j in range(count):
        column, length = own[j], 0.0
        for i in range(used + 1):
            length += columns[column, b, i] * columns[column, b, i]
        largest = max(largest, length)
        r[0, j] = columns[column, b, 0]
        for i in range(j + 1):
            triangle[i, j] = r[i + 1, j] = columns[column, b, own[i] + 1]
        nu = null_vector[b, column + 1]
        y[j] = -nu * null_vector[b, 0] / null_norm_sq[b]
        more = square + nu * nu
        best = min(best, latest)
        latest = np.sqrt(square / more)
        square = more
    _upper(triangle, count, y)
    square = 0.0
    for j in range(count):
        if not np.isfinite(y[j]):
            y[j] = 0.0
        square += y[j] * y[j]
        for k in range(used + 1):  # a column is the product with what is in one slot
            coefficients[k] += y[j] * columns[own[j], b, m + k]
    return count, np.sqrt(square), np.sqrt(largest), latest, best


@compiled
def _inverse_norm(count, size, work):
    """Return 1/σ_min(H̄) for the H̄ of `_small_solution`.

    A step of inverse iteration takes two triangular solves with R of H̄ = Q R, which Givens rotations make.
    """
    _, r, (y, x) = work
    if count == 0:
        return 1.0
    for i in range(count):
        length = np.hypot(r[i, i], r[i + 1, i])
        c, s = r[i, i] / length, r[i + 1, i] / length
        for j in range(i, count):
            r[i, j], r[i + 1, j] = c * r[i, j] + s * r[i + 1, j], c * r[i + 1, j] - s * r[i, j]
        x[i] = y[i] + 1e-3 * size  # not orthogonal to any vector by symmetry
    before = 0.0
    _normalized(x, count)
    for _ in range(SWEEPS):
        _lower(r, count, x)
        _upper(r, count, x)
        after = _normalized(x, count)
        settled = not abs(after - before) > SETTLED * after
        before = after
        if settled:
            break
    return np.sqrt(before)


@compiled
def least_squares(
    null_vector, columns, seen, used, null_norm_sq, inverse, coefficients, size, inverse_norm, column_norm, latest,
    best, start, stop,
):  # fmt: skip
    """Write y and the figures of `deqcore.linear.gmres.LeastSquares`, for β = 1.

    `inverse` marks the samples that need the norm of the inverse.
    """
    work = np.zeros((used, used)), np.zeros((used + 1, used)), np.empty((2, used))
    own = np.empty(used, np.int64)
    for b in range(start, stop):
        count, size[b], column_norm[b], latest[b], best[b] = _small_solution(
            b, null_vector, columns, seen, used, null_norm_sq, work, own, coefficients[b]
        )
        inverse_norm[b] = _inverse_norm(count, size[b], work) if inverse[b] else 1.0
