"""The compiled part of solves to an estimated error: the witness and the decisions. See `kernels.py`."""

from __future__ import annotations

from typing import Final

import numpy as np

from deqcore.linear.certified import BLURRED, NOTHING_HIDDEN
from deqcore.linear.rules import TIGHTER
from deqcore_torch.native.kernels import (
    _combined,
    _factored,
    _norm,
    _products,
    _slots,
    _substituted,
    compiled,
)
from deqcore_torch.native.krylov import _inverse_norm, _small_solution

CANCELLING: Final = 1e-3
"""Part of the squares of its terms that the square of a norm must be, if it comes from a Gram matrix."""


@compiled
def _multiplied(a, b, lower, out):
    """Write the product of small matrices, or only its lower triangle.

    Small matrices are read by their indices: a slice takes as long as a row.
    """
    for i in range(out.shape[0]):
        count, k = i + 1 if lower else out.shape[1], 0
        for j in range(count):
            out[i, j] = 0.0
        while k + 4 <= b.shape[0]:
            c0, c1, c2, c3 = a[i, k], a[i, k + 1], a[i, k + 2], a[i, k + 3]
            for j in range(count):
                out[i, j] += c0 * b[k, j] + c1 * b[k + 1, j] + c2 * b[k + 2, j] + c3 * b[k + 3, j]
            k += 4
        while k < b.shape[0]:
            for j in range(count):
                out[i, j] += a[i, k] * b[k, j]
            k += 1


@compiled
def _gathered(gram, pairs, b, slots, whole, steps, differences):
    """Write N = L + Lᵀ and the coefficients of steps and differences, all in the slots that a sample has seen."""
    m, count = gram.shape[2], whole.shape[0]
    for i in range(count):
        lower, pair = gram[slots[i], b], pairs[slots[i], b]
        for j in range(count):
            whole[i, j] = lower[slots[j]]
            steps[i, j] = pair[slots[j]]
            differences[i, j] = pair[m + slots[j]]
    for i in range(count):
        for j in range(i + 1):
            whole[i, j] += whole[j, i]
            whole[j, i] = whole[i, j]


@compiled
def _scale(square):
    """Return 1/√square, zero where a pair is missing."""
    return 1.0 / np.sqrt(square) if square > 0.0 else 0.0


@compiled
def _system(work, ridge, turned, factor, scales):
    """Write the columns of the pairs P, the factors of PᵀP + ridge, and the scales of steps and differences.

    `work` begins with what `_gathered` has written. A difference has few entries in the basis of residuals. Return
    whether the system is positive definite.
    """
    whole, steps, differences, product, across = work
    count = whole.shape[0]
    _multiplied(steps, whole, False, product)  # S N
    for i in range(count):
        square = 0.0
        for j in range(count):
            square += product[i, j] * steps[i, j]
            across[j, i] = product[i, j]
        scales[0, i] = _scale(square)
    for j in range(count):
        square = 0.0
        for i in range(count):
            turned[j, i] = 0.0
        for k in range(count):
            e = differences[j, k]
            if scales[0, j] > 0.0 and e != 0.0:
                for i in range(count):
                    square += e * whole[k, i] * differences[j, i]
                    turned[j, i] += e * across[k, i]
        scales[1, j] = _scale(square)
    for j in range(count):
        for i in range(count):
            turned[j, i] *= scales[0, i] * scales[1, j]
            product[i, j] = turned[j, i]
    _multiplied(turned, product, True, factor)
    for j in range(count):
        factor[j, j] += ridge
    return _factored(factor)


@compiled
def _solution(pairs, b, slots, used, q, turned, factor, scales, t, c):
    """Write the coefficients c of Hᵀv + v for q = Qᵀv; return whether they are finite."""
    m, count = q.shape[0], turned.shape[0]
    for i in range(count):
        pair, total = pairs[slots[i], b], 0.0
        for k in range(used):
            total += (pair[k] + pair[m + k]) * q[k]
        t[i] = scales[1, i] * total if scales[1, i] > 0.0 else 0.0
    _substituted(factor, t)
    c[:] = 0.0
    for i in range(count):
        pair, w = pairs[slots[i], b], 0.0
        for j in range(count):
            w += turned[j, i] * t[j]
        for k in range(used):
            c[k] += scales[0, i] * w * pair[k]
    sound = True
    for k in range(used):
        sound = sound and np.isfinite(c[k])
    return sound


@compiled
def _square(memory, count):
    """Return the beginning of one-dimensional memory as a matrix of `count` rows."""
    return memory[: count * count].reshape((count, count))


@compiled
def _factored_pairs(gram, pairs, b, slots, count, ridge, work, memory, scales):
    """Factor the system of a sample in `memory`; return whether it is positive definite."""
    whole, steps, differences = _square(work[0], count), _square(work[1], count), _square(work[2], count)
    _gathered(gram, pairs, b, slots, whole, steps, differences)
    small = whole, steps, differences, _square(work[3], count), _square(work[4], count)
    return _system(small, ridge, _square(memory[0], count), _square(memory[1], count), scales)


@compiled
def secants(v, basis, per_chunk, seen, gram, pairs, used, ridge, out, start, stop):
    """Write Hᵀ v of the estimate of `deqcore.linear.lowrank.multisecant`; rows that are zero cost nothing.

    gram `(m, batch, m)` and pairs `(m, batch, 2 m)` are the only chunks of the histories of Broyden's method.
    """
    m = seen.shape[1]
    work, memory = np.empty((5, used * used)), np.empty((2, used * used))
    t, scales, (q, c), slots = np.empty(used), np.empty((2, used)), np.empty((2, m)), np.empty(m, np.int64)
    for b in range(start, stop):
        rest = out[b]
        for i in range(rest.shape[0]):
            rest[i] = -v[b, i]
        if not np.any(rest != 0.0):
            continue
        count = _slots(seen[b], used, slots)
        _products(basis, per_chunk, slots, count, v[b], b, v, q)
        sound = _factored_pairs(gram, pairs, b, slots, count, ridge, work, memory, scales)
        turned, factor = _square(memory[0], count), _square(memory[1], count)
        if _solution(pairs, b, slots, used, q, turned, factor, scales, t[:count], c) and sound:
            _combined(basis, per_chunk, slots, count, c, rest, b, v, rest)


@compiled
def _reached(
    b, r, like, basis, per_chunk, seen, gram, pairs, ridge, state, memory, scales, used, work, slots, t, q, c,
):  # fmt: skip
    """Return ‖Hᵀ r‖. r is overwritten.

    The estimate's history is read once: the norm comes from its Gram matrix, unless its terms cancel. The system of a
    sample is factored in `memory` when it is first asked: `state` is then 1, or −1 if the system has no solution.
    """
    length, count = _norm(r), _slots(seen[b], used, slots)
    _products(basis, per_chunk, slots, count, r, b, like, q)
    if state[b] == 0:
        state[b] = 1 if _factored_pairs(gram, pairs, b, slots, count, ridge, work, memory[b], scales[b]) else -1
    turned, factor = _square(memory[b, 0], count), _square(memory[b, 1], count)
    sound = _solution(pairs, b, slots, used, q, turned, factor, scales[b], t[:count], c)
    if not sound or state[b] < 0:
        return length
    square, terms = length * length, 0.0
    for i in range(count):
        k, row = slots[i], gram[slots[i], b]
        total = 0.0
        for j in range(used):
            total += row[j] * c[j]
        square += 2.0 * c[k] * (total - q[k])
        terms += abs(c[k]) * np.sqrt(2.0 * abs(row[k]))
    if square > CANCELLING * (length * length + terms * terms):
        return np.sqrt(square)
    for i in range(r.shape[0]):
        r[i] = -r[i]
    _combined(basis, per_chunk, slots, count, c, r, b, like, r)
    return _norm(r)


@compiled
def _estimated(rule, reach, steps, inverse_norm, latest, best):
    """Return the error and the factor for the witness, as `deqcore.linear.rules.estimates`.

    `reach` is the residual, or what rounding hides of it if that is more, over the size of the solution.
    """
    youth = rule.youth * (min(max(inverse_norm, 1.0), rule.deepest) / max(float(steps), 1.0) ** rule.aging)
    slower = min(max(latest / best, 1.0), rule.most) ** rule.rise
    plain = reach * inverse_norm
    error = plain * rule.spread * (1.0 + youth) * latest**rule.fall * slower
    return error, plain * (rule.mean * latest * slower) ** 2


@compiled
def judge(
    latest, basis, per_chunk, basis_used, basis_seen, columns, columns_used, columns_seen, null_vector, null_norm_sq,
    start_norm, left, can_grow, steps, waiting, pending, rule, target, hidden, ridge, max_vjps, norm,
    goal, spent_before, size_before, secants, secants_per_chunk, secants_used, secants_seen, gram, pairs, state,
    memory, scales, asks, x, residual, error, met, unverified, start, stop,
):  # fmt: skip
    """Decide for the samples that are `pending` after a step, and write the solution of those that are done.

    Names and formulas are those of `deqcore.linear.certified`: `left` is the residual by the recurrence, `hidden` the
    relative residual that rounding hides, and `ridge` that of the witness. `asks` is false without a witness.
    """
    n, m, used = latest.shape[1], null_vector.shape[1], columns_used
    p = secants_used if asks else 0
    small = np.zeros((used, used)), np.zeros((used + 1, used)), np.empty((2, used))
    own, slots = np.empty(used, np.int64), np.empty(m, np.int64)
    (y, coefficients), nothing, r = np.empty((2, m)), np.zeros(n, latest.dtype), np.empty(n, latest.dtype)
    work, t, (q, c) = np.empty((5, p * p)), np.empty(p), np.empty((2, secants_seen.shape[1]))
    pair_slots = np.empty(secants_seen.shape[1], np.int64)
    for b in range(start, stop):
        over = spent_before[b] + steps[b] >= max_vjps
        if not pending[b] or (left[b] > goal[b] and can_grow[b] and not over):
            continue
        count, y_norm, column_norm, ratio, best = _small_solution(
            b, null_vector, columns, columns_seen, used, null_norm_sq, small, own, y
        )
        size = y_norm * start_norm[b]
        whole = abs(size_before[b] - size)
        rounding = hidden * max(column_norm * size, whole)
        blurred = rounding > BLURRED * target * norm[b]
        spent = blurred and left[b] <= rounding
        closed = not can_grow[b] or spent
        old_enough = steps[b] >= rule.least or left[b] <= NOTHING_HIDDEN * target * norm[b] or closed
        reached = old_enough and left[b] <= goal[b]
        if not (reached or closed or over):
            continue
        inverse_norm = _inverse_norm(count, y_norm, small)
        found, other = _estimated(rule, max(left[b], rounding) / whole, steps[b], inverse_norm, ratio, best)
        hopeful = old_enough and left[b] <= target * norm[b] and found <= target
        seen = _slots(basis_seen[b], basis_used, slots)
        if asks and (hopeful or closed or over):
            scale = start_norm[b] * (null_vector[b, 0] / null_norm_sq[b])
            for k in range(m):
                coefficients[k] = scale * null_vector[b, k]
            _combined(basis, per_chunk, slots, seen, coefficients, nothing, b, latest, r)
            reach = _reached(
                b, r, latest, secants, secants_per_chunk, secants_seen, gram, pairs, ridge, state, memory, scales, p,
                work, pair_slots, t, q, c,
            )  # fmt: skip
            reach = reach / whole
            found = max(found, rule.witness * reach, np.sqrt(other * reach)) if reach < np.inf else np.inf
        residual[b], error[b] = max(left[b], rounding) / norm[b], found
        passed = hopeful and found <= target
        met[b] |= passed and not blurred
        unverified[b] |= blurred and (passed or spent)
        if reached:
            goal[b] = left[b] * min(max(target / found, TIGHTER[0]), TIGHTER[1])
        if met[b] or unverified[b] or over or not can_grow[b]:
            can_grow[b] = waiting[b] = pending[b] = False
            for k in range(m):
                y[k] *= start_norm[b]
            _combined(basis, per_chunk, slots, seen, y, nothing, b, latest, x[b])
