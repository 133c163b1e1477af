"""The compiled part of GMRES and of the estimates that judge it: see `kernels.py`, whose conventions hold here."""

from __future__ import annotations

from typing import Final

import numpy as np

from deqcore_torch.native.kernels import (
    _add,
    _combined,
    _component,
    _copy,
    _dot,
    _factored,
    _norm,
    _products,
    _projected,
    _slots,
    _substituted,
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
    """Solve T x = x in place, for upper triangular T in the rows and columns below `count`."""
    for i in range(count - 1, -1, -1):
        x[i] = (x[i] - _dot(matrix[i, i + 1 : count], x[i + 1 : count])) / matrix[i, i]


@compiled
def _lower(matrix, count, x):
    """Solve Tᵀ x = x in place."""
    for i in range(count):
        x[i] /= matrix[i, i]
        _add(-x[i], matrix[i, i + 1 : count], x[i + 1 : count])


@compiled
def least_squares(
    null_vector, columns, seen, used, null_norm_sq, inverse, coefficients, size, inverse_norm, column_norm, latest,
    best, start, stop,
):  # fmt: skip
    """Write y and the figures of `deqcore.linear.gmres.LeastSquares`, for β = 1.

    `inverse` marks the samples that need the norm of the inverse.

    A step of inverse iteration takes two triangular solves with R of H̄ = Q R, which Givens rotations make.
    """
    m = null_vector.shape[1]
    triangle, r = np.zeros((used, used)), np.zeros((used + 1, used))
    y, x = np.empty(used), np.empty(used)
    nu = np.empty(used)
    own = np.empty(used, np.int64)
    for b in range(start, stop):
        coefficients[b] = 0.0
        count = 0
        for j in range(used):
            if seen[b, j]:
                own[count] = j
                count += 1
        largest = 0.0
        for j in range(count):
            column = columns[own[j], b]
            largest = max(largest, _dot(column[: used + 1], column[: used + 1]))
            r[0, j] = column[0]
            for i in range(count):
                triangle[i, j] = r[i + 1, j] = column[own[i] + 1] if i <= j else 0.0
            nu[j] = null_vector[b, own[j] + 1]
            y[j] = -nu[j] * null_vector[b, 0] / null_norm_sq[b]
        column_norm[b] = np.sqrt(largest)
        inverse_norm[b] = latest[b] = best[b] = 1.0
        size[b] = 0.0
        square = null_vector[b, 0] * null_vector[b, 0]
        for j in range(count):
            more = square + nu[j] * nu[j]
            best[b] = min(best[b], latest[b])
            latest[b] = np.sqrt(square / more)
            square = more
        if count == 0:
            continue
        _upper(triangle, count, y)
        square = 0.0
        for j in range(count):
            if not np.isfinite(y[j]):
                y[j] = 0.0
            square += y[j] * y[j]
        size[b] = np.sqrt(square)
        for j in range(count):
            source = columns[own[j], b, m:]
            _add(y[j], source, coefficients[b])
        if not inverse[b]:
            continue
        for i in range(count):
            length = np.hypot(r[i, i], r[i + 1, i])
            c, s = r[i, i] / length, r[i + 1, i] / length
            for j in range(i, count):
                r[i, j], r[i + 1, j] = c * r[i, j] + s * r[i + 1, j], c * r[i + 1, j] - s * r[i, j]
            x[i] = y[i] + 1e-3 * size[b]  # not orthogonal to any vector by symmetry
        before = 0.0
        for _ in range(SWEEPS):
            length = np.sqrt(_dot(x[:count], x[:count]))
            for j in range(count):
                x[j] /= length
            _lower(r, count, x)
            _upper(r, count, x)
            after = np.sqrt(_dot(x[:count], x[:count]))
            if not abs(after - before) > SETTLED * after:
                before = after
                break
            before = after
        inverse_norm[b] = np.sqrt(before)


CANCELLING: Final = 1e-3
"""Part of the squares of its terms that the square of a norm must be, if it comes from a Gram matrix."""


@compiled
def _multiplied(a, b, first, last, out):
    """Write the product of small matrices; row k of b is zero outside of `first[k] … last[k]`."""
    out[:] = 0.0
    for i in range(a.shape[0]):
        for k in range(a.shape[1]):
            if a[i, k] != 0.0:
                _add(a[i, k], b[k, first[k] : last[k]], out[i, first[k] : last[k]])


@compiled
def _symmetric(gram, b, known, whole):
    """Write N = L + Lᵀ."""
    used = whole.shape[0]
    for i in range(used):
        for j in range(used):
            whole[i, j] = gram[i, b, j] if known[i] else 0.0
    for i in range(used):
        for j in range(i + 1):
            whole[i, j] += whole[j, i]
            whole[j, i] = whole[i, j]


@compiled
def _system(gram, pairs, b, known, ridge, work, first, last, turned, factor, scales):
    """Write the columns of the pairs P, the factors of PᵀP + ridge, and the scales of steps and differences.

    Return whether the system is positive definite.
    """
    whole, across, product, differences = work
    used, m = whole.shape[0], gram.shape[2]
    _symmetric(gram, b, known, whole)
    for j in range(used):  # Sᵀ, whose row j is zero before the step that first used slot j
        first[j], last[j] = used, 0
        for i in range(used):
            across[j, i] = pairs[i, b, j] if known[i] else 0.0
            if across[j, i] != 0.0:
                first[j], last[j] = min(first[j], i), i + 1
        if first[j] > last[j]:
            first[j] = 0
    _multiplied(whole, across, first, last, product)  # N Sᵀ
    s, y = scales
    s[:] = 0.0
    for j in range(used):
        for i in range(used):
            s[i] += product[j, i] * across[j, i]
    for i in range(used):
        s[i] = 1.0 / np.sqrt(s[i]) if s[i] > 0.0 else 0.0
        for j in range(used):
            differences[i, j] = pairs[i, b, m + j] if known[i] and s[i] > 0.0 else 0.0
        last[i] = used
    first[:] = 0
    _multiplied(differences, whole, first, last, turned)
    for i in range(used):
        square = _dot(turned[i], differences[i])
        y[i] = 1.0 / np.sqrt(square) if square > 0.0 else 0.0
    _multiplied(differences, product, first, last, turned)  # rows are the columns of the pairs
    for j in range(used):
        for i in range(used):
            turned[j, i] *= s[i] * y[j]
            across[i, j] = turned[j, i]
    factor[:] = 0.0
    for j in range(used):  # the lower triangle alone
        for i in range(used):
            _add(turned[j, i], across[i, : j + 1], factor[j, : j + 1])
        factor[j, j] += ridge
    return _factored(factor)


@compiled
def _solution(pairs, b, known, q, turned, factor, scales, t, w, c):
    """Write the coefficients c of Hᵀv + v for q = Qᵀv; return whether they are finite."""
    used, m = t.shape[0], q.shape[0]
    s, y = scales
    for i in range(used):
        t[i] = 0.0
        if known[i] and y[i] != 0.0:
            t[i] = y[i] * (_dot(pairs[i, b, :used], q[:used]) + _dot(pairs[i, b, m : m + used], q[:used]))
    _substituted(factor, t)
    w[:] = 0.0
    for j in range(used):
        _add(t[j], turned[j], w)
    c[:] = 0.0
    for i in range(used):
        if known[i]:
            _add(s[i] * w[i], pairs[i, b, :used], c[:used])
    sound = True
    for i in range(used):
        sound = sound and np.isfinite(c[i])
        if not known[i]:
            c[i] = 0.0
    return sound


@compiled
def secants(v, basis, per_chunk, seen, gram, pairs, used, ridge, out, start, stop):
    """Write Hᵀ v of the estimate of `deqcore.linear.lowrank.multisecant`; rows that are zero cost nothing.

    gram `(m, batch, m)` and pairs `(m, batch, 2 m)` are the only chunks of the histories of Broyden's method.
    """
    m = seen.shape[1]
    work, scales, ends = np.empty((4, used, used)), np.empty((2, used)), np.empty((2, used), np.int64)
    turned, factor = np.empty((2, used, used))
    t, w = np.empty((2, used))
    q, c = np.empty((2, m))
    slots = np.empty(m, np.int64)
    for b in range(start, stop):
        rest = out[b]
        for i in range(rest.shape[0]):
            rest[i] = -v[b, i]
        if not np.any(rest != 0.0):
            continue
        count = _slots(seen[b], used, slots)
        _products(basis, per_chunk, slots, count, v[b], b, v, q)
        sound = _system(gram, pairs, b, seen[b], ridge, work, ends[0], ends[1], turned, factor, scales)
        if _solution(pairs, b, seen[b], q, turned, factor, scales, t, w, c) and sound:
            _combined(basis, per_chunk, slots, count, c, rest, b, v, rest)


@compiled
def reach(
    latest, space, space_per_chunk, space_used, space_seen, null_vector, null_norm_sq, size, wanted, basis, per_chunk,
    seen, gram, pairs, ridge, state, turned, factors, scales, out, start, stop,
):  # fmt: skip
    """Write ‖Hᵀ r‖ for the residual r of a Krylov space, for the samples that are `wanted`, and 0 for others.

    r is in the scratch memory of a sample only. The estimate's history is read once: the norm comes from its Gram
    matrix, unless its terms cancel. The system of a sample is factored when it is first asked: `state` is then 1, or
    −1 if the system has no solution.
    """
    used, m, n = turned.shape[1], seen.shape[1], latest.shape[1]
    work, ends = np.empty((4, used, used)), np.empty((2, used), np.int64)
    t, w = np.empty((2, used))
    q, c = np.empty((2, m))
    slots, own = np.empty(m, np.int64), np.empty(null_vector.shape[1], np.int64)
    coefficients = np.empty(null_vector.shape[1])
    nothing, r = np.zeros(n, latest.dtype), np.empty(n, latest.dtype)
    for b in range(start, stop):
        out[b] = 0.0
        if not wanted[b]:
            continue
        scale = size[b] * (null_vector[b, 0] / null_norm_sq[b])
        for k in range(coefficients.shape[0]):
            coefficients[k] = scale * null_vector[b, k]
        count = _slots(space_seen[b], space_used, own)
        _combined(space, space_per_chunk, own, count, coefficients, nothing, b, latest, r)
        length = _norm(r)
        out[b] = length
        count = _slots(seen[b], used, slots)
        _products(basis, per_chunk, slots, count, r, b, latest, q)
        if state[b] == 0:
            sound = _system(gram, pairs, b, seen[b], ridge, work, ends[0], ends[1], turned[b], factors[b], scales[b])
            state[b] = 1 if sound else -1
        sound = _solution(pairs, b, seen[b], q, turned[b], factors[b], scales[b], t, w, c)
        if not sound or state[b] < 0:
            continue
        square, terms = length * length, 0.0
        for i in range(used):
            if seen[b, i]:
                row = gram[i, b]
                square += 2.0 * c[i] * (_dot(row[:used], c[:used]) - q[i])
                terms += abs(c[i]) * np.sqrt(2.0 * abs(row[i]))
        if square > CANCELLING * (length * length + terms * terms):
            out[b] = np.sqrt(square)
        else:
            for i in range(n):
                r[i] = -r[i]
            _combined(basis, per_chunk, slots, count, c, r, b, latest, r)
            out[b] = _norm(r)
