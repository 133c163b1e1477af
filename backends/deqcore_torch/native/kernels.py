"""Solver steps compiled for the CPU, one sample at a time: its history is read once, and its bits ignore the batch.

Histories come as the addresses of their chunks `(slots, batch, n)`; the mask `seen` `(batch, slots)` marks the slots
that a sample has seen. Each kernel works on samples `start … stop` and holds no lock. Vectors are read in blocks that
stay in the cache, four at a time. A block is summed in the vectors' own dtype, in vector registers; the sums over
blocks and all small algebra are in float64. Loops over numbers go over slices from 0: with another start the compiler
has to handle negative indices, and does not use vector registers.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from deqcore.solvers.levels import ACCELERATED, GROWN, HALVED, NEVER, NEWTON, PLAIN
from deqcore.types import Status

BLOCK: Final = 4096  # numbers
TOGETHER: Final = 16  # samples
KEPT: Final = 2**17  # numbers of history that stay in the cache
CONVERGED, NONFINITE = int(Status.CONVERGED), int(Status.NONFINITE)
EPS: Final = float(np.finfo(np.float64).eps)
# Sums may be reordered, but NaN and inf are statuses: no "nnan", no "ninf".
_njit: Final = njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})
SOURCES: Final = sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def compiled(function: Any) -> Any:
    """Compile a function when it is first called.

    Numba's cache finds code by the function's name and its own file. The name gets a stamp of all files here, because
    compiled code contains functions of other files, too.
    """
    function.__qualname__ = f"{function.__name__}_{SOURCES[:8]}"
    return _njit(function)


@intrinsic
def _at(_context: Any, address: Any, like: Any) -> Any:
    """Return a pointer to numbers of the dtype of `like`; the compiler adds the context."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), code


@compiled
def _square(x):
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return total


@compiled
def _square_of_difference(x, y):
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        d = x[i] - y[i]
        total += d * d
    return total


@compiled
def _largest(x):
    """Return the largest |x_i|, or 1 if it is 0 or not finite, so that a row can be divided by it."""
    largest = 0.0
    for i in range(x.shape[0]):
        largest = max(largest, abs(np.float64(x[i])))
    return largest if 0.0 < largest < np.inf else 1.0


@compiled
def _norm(x):
    """Return ‖x‖, in float64 and scaled if a sum in the vectors' own dtype would overflow or vanish."""
    total = 0.0
    for low in range(0, x.shape[0], BLOCK):
        total += _square(x[low : low + BLOCK])
    if not 1e-30 < total < 1e30:
        total, scale = 0.0, _largest(x)
        for i in range(x.shape[0]):
            part = np.float64(x[i]) / scale
            total += part * part
        return scale * np.sqrt(total)
    return np.sqrt(total)


@compiled
def _largest_difference(x, y):
    """Return `_largest` of x − y."""
    largest = 0.0
    for i in range(x.shape[0]):
        largest = max(largest, abs(np.float64(x[i]) - np.float64(y[i])))
    return largest if 0.0 < largest < np.inf else 1.0


@compiled
def _distance(x, y):
    """Return ‖x − y‖, scaled as in `_norm`."""
    total = 0.0
    for low in range(0, x.shape[0], BLOCK):
        total += _square_of_difference(x[low : low + BLOCK], y[low : low + BLOCK])
    if not 1e-30 < total < 1e30:
        total, scale = 0.0, _largest_difference(x, y)
        for i in range(x.shape[0]):
            d = (np.float64(x[i]) - np.float64(y[i])) / scale
            total += d * d
        return scale * np.sqrt(total)
    return np.sqrt(total)


@compiled
def norms(z, fz, residual, size, start, stop):
    """Write ‖f(z) − z‖ and ‖f(z)‖ of each sample."""
    for b in range(start, stop):
        residual[b] = _distance(fz[b], z[b])
        size[b] = _norm(fz[b])


@compiled
def first_figures(z, fz, rtol, atol, tiny, figures, counts, start, stop):
    """Write the figures of the loop state before the first step, in the dtype of the norms."""
    kind = figures.dtype.type
    peaks, references, marks, lengths, tried = figures
    for b in range(start, stop):
        residual, size, reference = kind(_distance(fz[b], z[b])), kind(_norm(fz[b])), kind(_norm(z[b]))
        reference = reference if reference > size else size
        least = kind(tiny) * reference
        goal = kind(rtol) * (size if size > least else least) if rtol > 0.0 else kind(0.0)
        finite = np.isfinite(residual)
        peaks[b], references[b], marks[b] = residual, reference, residual if finite else kind(np.inf)
        lengths[b], tried[b] = kind(0.5), kind(np.inf)
        counts[0, b] = NONFINITE if not finite else CONVERGED if residual <= kind(atol) + goal else 0
        counts[1, b] = 0


@compiled
def _part(chunks, per_chunk, slot, row, like, low):
    """Return a block of the vector in `slot` of this sample, from `low` on."""
    batch, n = like.shape
    offset = ((slot % per_chunk) * batch + row) * n + low
    return carray(_at(chunks[slot // per_chunk] + offset * like.itemsize, like), (min(BLOCK, n - low),))


@compiled
def _copy(x, y):
    for i in range(y.shape[0]):
        y[i] = x[i]


@compiled
def _subtract_scaled(x, y, factor, out):
    number = out.dtype.type(factor)
    for i in range(out.shape[0]):
        out[i] = (x[i] - y[i]) * number


@compiled
def _dot(x, y):
    total = y.dtype.type(0)
    for i in range(y.shape[0]):
        total += x[i] * y[i]
    return total


@compiled
def _dots(x0, x1, x2, x3, y):
    t0 = t1 = t2 = t3 = y.dtype.type(0)
    for i in range(y.shape[0]):
        t0 += x0[i] * y[i]
        t1 += x1[i] * y[i]
        t2 += x2[i] * y[i]
        t3 += x3[i] * y[i]
    return t0, t1, t2, t3


@compiled
def _add(c, x, y):
    for i in range(y.shape[0]):
        y[i] += c * x[i]


@compiled
def _adds(c0, x0, c1, x1, c2, x2, c3, x3, y):
    for i in range(y.shape[0]):
        y[i] += c0 * x0[i] + c1 * x1[i] + c2 * x2[i] + c3 * x3[i]


@compiled
def _slots(seen, used, slots):
    """Write the slots that a sample has seen into `slots` and return their count."""
    count = 0
    for k in range(used):
        if seen[k]:
            slots[count] = k
            count += 1
    return count


@compiled
def _products(chunks, per_chunk, slots, count, v, row, like, out):
    """Write `out[k]` = h_kᵀv for `count` slots, 0 for others."""
    out[:] = 0.0
    for low in range(0, v.shape[0], BLOCK):
        part = v[low : low + BLOCK]
        j = 0
        while j + 4 <= count:
            k0, k1, k2, k3 = slots[j], slots[j + 1], slots[j + 2], slots[j + 3]
            t0, t1, t2, t3 = _dots(
                _part(chunks, per_chunk, k0, row, like, low),
                _part(chunks, per_chunk, k1, row, like, low),
                _part(chunks, per_chunk, k2, row, like, low),
                _part(chunks, per_chunk, k3, row, like, low),
                part,
            )
            out[k0] += t0
            out[k1] += t1
            out[k2] += t2
            out[k3] += t3
            j += 4
        while j < count:
            out[slots[j]] += _dot(_part(chunks, per_chunk, slots[j], row, like, low), part)
            j += 1


@compiled
def _combined(chunks, per_chunk, slots, count, coefficients, base, row, like, out):
    """Write `out` = base + Σ c_k h_k over `count` slots."""
    number = like.dtype.type
    for low in range(0, out.shape[0], BLOCK):
        part = out[low : low + BLOCK]
        _copy(base[low : low + BLOCK], part)
        j = 0
        while j + 4 <= count:
            k0, k1, k2, k3 = slots[j], slots[j + 1], slots[j + 2], slots[j + 3]
            _adds(
                number(coefficients[k0]),
                _part(chunks, per_chunk, k0, row, like, low),
                number(coefficients[k1]),
                _part(chunks, per_chunk, k1, row, like, low),
                number(coefficients[k2]),
                _part(chunks, per_chunk, k2, row, like, low),
                number(coefficients[k3]),
                _part(chunks, per_chunk, k3, row, like, low),
                part,
            )
            j += 4
        while j < count:
            _add(number(coefficients[slots[j]]), _part(chunks, per_chunk, slots[j], row, like, low), part)
            j += 1


@compiled
def combined(base, chunks, per_chunk, used, seen, coefficients, out, start, stop):
    """Write base + Σ c_k h_k of each sample, with the same bits as the iterates computed ahead by steps."""
    slots = np.empty(seen.shape[1], np.int64)
    for b in range(start, stop):
        count = _slots(seen[b], used, slots)
        _combined(chunks, per_chunk, slots, count, coefficients[b], base[b], b, base, out[b])


@compiled
def _stored(chunks, per_chunk, slot, row, like, x, y, factor):
    """Write (x − y) `factor` into the slot of this sample."""
    for low in range(0, x.shape[0], BLOCK):
        part = _part(chunks, per_chunk, slot, row, like, low)
        _subtract_scaled(x[low : low + BLOCK], y[low : low + BLOCK], factor, part)


@compiled
def _written(chunks, per_chunk, slot, row, like, x):
    """Write x into the slot of this sample."""
    for low in range(0, x.shape[0], BLOCK):
        _copy(x[low : low + BLOCK], _part(chunks, per_chunk, slot, row, like, low))


@compiled
def _cleared(chunks, per_chunk, slot, row, like):
    """Zero the slot of a sample that is not active, which must not hold uninitialised memory."""
    for low in range(0, like.shape[1], BLOCK):
        _part(chunks, per_chunk, slot, row, like, low)[:] = 0


@compiled
def broyden(
    z, fz, ahead, basis, per_chunk, slot, used, fresh, active, seen, gram, left, right, pairs, before, step, norm,
    unit, next_step, next_norm, size, start, stop,
):  # fmt: skip
    """Do the part of a step of `Broyden` after f, with the next iterate z + Q c in `ahead` and ‖f(z)‖ in `size`.

    Names and formulas are those of `deqcore.solvers.broyden`; gram, left, right `(m, batch, m)` and pairs
    `(m, batch, 2 m)` are the only chunks of their histories. Small algebra takes several samples at a time, because
    their rows in a slot are neighbours in memory; one sample at a time, each row would be on another page.
    """
    m = step.shape[1]
    group = min(max(KEPT // (z.shape[1] * used), 1), TOGETHER)
    d, w, u, v = np.empty((group, m)), np.empty((group, m)), np.empty((group, m)), np.empty((group, m))
    slots, scaled_step = np.empty(m, np.int64), np.empty(m)
    for first in range(start, stop, group):
        rows = min(group, stop - first)
        for j in range(rows):
            b = first + j
            if not active[b]:
                if fresh:
                    _cleared(basis, per_chunk, slot, b, z)
                    gram[slot, b] = left[slot, b] = right[slot, b] = 0.0
                    pairs[slot, b] = 0.0
                next_step[b] = step[b]
                next_norm[b] = norm[b]
                size[b] = 0.0
                _copy(z[b], ahead[b])
                continue
            g = ahead[b]  # for now: where products find it in the cache
            _subtract_scaled(fz[b], z[b], 1.0 / unit[b], g)
            next_norm[b] = unit[b] * _norm(g)
            size[b] = _norm(fz[b])
            _written(basis, per_chunk, slot, b, z, g)
            count = _slots(seen[b], used, slots)
            _products(basis, per_chunk, slots, count, g, b, z, d[j])
            _copy(d[j], gram[slot, b])
            gram[slot, b, slot] *= 0.5
            w[j] = 0.0
            u[j] = 0.0
            u[j, slot] = 1.0
            v[j] = step[b]
        for k in range(used):  # w = (L + Lᵀ) c
            for j in range(rows):
                b = first + j
                if active[b] and seen[b, k]:
                    row, c = gram[k, b], step[b]
                    w[j, k] += _dot(row[:used], c[:used])
                    _add(c[k], row[:used], w[j, :used])
        for k in range(used):  # u = e + K d, v = c + Kᵀw; the new slot is not filled yet
            for j in range(rows):
                b = first + j
                if active[b] and seen[b, k] and k != slot:
                    x, y = left[k, b], right[k, b]
                    _add(_dot(y[:used], d[j, :used]), x[:used], u[j, :used])
                    _add(_dot(x[:used], w[j, :used]), y[:used], v[j, :used])
        for j in range(rows):
            b = first + j
            if active[b]:
                ss = _dot(w[j, :used], step[b, :used])
                sh = _dot(w[j, :used], u[j, :used])
                inverse = 0.0
                if abs(ss - sh) > EPS * ss:
                    inverse = 1.0 / (ss - sh)
                for k in range(m):
                    scaled = inverse * u[j, k]
                    left[slot, b, k] = scaled
                    right[slot, b, k] = v[j, k]
                    pairs[slot, b, k] = step[b, k]
                    pairs[slot, b, m + k] = -before[b, k]
                    next_step[b, k] = u[j, k] + sh * scaled
                pairs[slot, b, m + slot] += 1.0
                count = _slots(seen[b], used, slots)
                scaled_step[:] = next_step[b] * unit[b]
                _combined(basis, per_chunk, slots, count, scaled_step, z[b], b, z, ahead[b])


@compiled
def _solved(a, b, m):
    """Solve a x = b in place, by elimination with row exchanges; x is in b, not finite where a is singular."""
    for k in range(m):
        best = k
        for i in range(k + 1, m):
            if abs(a[i, k]) > abs(a[best, k]):
                best = i
        if best != k:
            for j in range(k, m):
                a[k, j], a[best, j] = a[best, j], a[k, j]
            b[k], b[best] = b[best], b[k]
        for i in range(k + 1, m):
            factor = a[i, k] / a[k, k]
            for j in range(k, m):
                a[i, j] -= factor * a[k, j]
            b[i] -= factor * b[k]
    for k in range(m - 1, -1, -1):
        for j in range(k + 1, m):
            b[k] -= a[k, j] * b[j]
        b[k] /= a[k, k]


@compiled
def anderson(
    z, fz, before_f, before_g, ahead, values, residuals, per_chunk, slot, used, fresh, active, going, seen,
    system, scale, target, step, unit, ridge, next_g, next_system, next_scale, next_target, next_step, start, stop,
):  # fmt: skip
    """Do the part of a step of `Anderson` with mixing 1 after f, with the next iterate f(z) − ΔF γ in `ahead`.

    The next point of a sample that is not `active` is f(z), or the f(z) before this step if it is not `going` either.
    Names and formulas are those of `deqcore.solvers.anderson`.
    """
    m = step.shape[1]
    matrix, x = np.empty((m, m)), np.empty(m)
    slots = np.empty(m, np.int64)
    for b in range(start, stop):
        next_system[b] = system[b]
        next_scale[b] = scale[b]
        next_target[b] = target[b]
        next_step[b] = step[b]
        if not active[b]:
            if fresh:
                _cleared(values, per_chunk, slot, b, z)
                _cleared(residuals, per_chunk, slot, b, z)
            _copy(before_g[b], next_g[b])
            _copy(fz[b] if going[b] else before_f[b], ahead[b])
            continue
        inverse_unit = 1.0 / unit[b]
        _stored(values, per_chunk, slot, b, z, fz[b], before_f[b], inverse_unit)
        g = next_g[b]
        _subtract_scaled(fz[b], z[b], inverse_unit, g)
        _stored(residuals, per_chunk, slot, b, z, g, before_g[b], 1.0)
        length = _distance(g, before_g[b])
        inverse = 1.0 / length if length > 0.0 else 0.0
        next_scale[b, slot] = inverse
        count = _slots(seen[b], used, slots)
        _products(residuals, per_chunk, slots, count, g, b, z, next_target[b])
        for k in range(m):
            entry = (next_target[b, k] - target[b, k]) * next_scale[b, k] * inverse
            if k == slot:
                entry = 1.0 + ridge
            next_system[b, slot, k] = entry
            next_system[b, k, slot] = entry
        matrix[:] = next_system[b]
        x[:] = next_target[b] * next_scale[b]
        _solved(matrix, x, m)
        for k in range(m):
            x[k] *= -next_scale[b, k]
            if not np.isfinite(x[k]):
                x[k] = 0.0
            next_step[b, k] = x[k]
            x[k] *= unit[b]
        _combined(values, per_chunk, slots, count, x, fz[b], b, z, ahead[b])


@compiled
def steady(
    norm, level, before, best, mark, since, rate, running, slow, plain_steps, patience, trial, growth,
    next_norm, next_best, next_mark, next_since, event, start, stop,
):  # fmt: skip
    """Write the progress of samples after a step in which none changes its level or rate and none refuses.

    Write True to `event` `(1,)` where one does: `deqcore.solvers.levels.judged`, whose names and rules these are,
    decides on that step. Samples that are not `running` keep their progress.
    """
    kind = norm.dtype.type
    for b in range(start, stop):
        now, steps, tried = norm[b], since[b] + 1, False
        if not running[b]:
            next_norm[b], next_best[b], next_mark[b], next_since[b] = before[b], best[b], mark[b], since[b]
            continue
        if level[b] != NEWTON and now > kind(growth) * best[b]:
            event[0] = True
            return
        if level[b] == PLAIN:
            if rate[b] > 0.0:
                fast = now <= kind(0.5) * (kind(1.0) + rate[b]) * before[b]
            else:
                first = since[b] < 1 and now <= kind(GROWN) * before[b]
                later = now <= kind(slow) * before[b] or now <= kind(slow * slow) * mark[b]
                fast = (first or later) and since[b] < plain_steps - 1
            if not fast or not before[b] > 0.0:
                event[0] = True
                return
            next_mark[b], next_since[b] = before[b], steps
        else:
            gained = now < kind(HALVED) * mark[b]
            if level[b] == ACCELERATED:
                tried = rate[b] < kind(NEVER)
                if (not gained and steps >= patience) or (gained and tried and steps >= trial):
                    event[0] = True
                    return
            marked = gained and not tried
            next_mark[b], next_since[b] = now if marked else mark[b], 0 if marked else steps
        next_norm[b], next_best[b] = now, now if now < best[b] else best[b]


CANCELLED = 0.7071067811865476  # as `deqcore.linear.norms.CANCELLED`, which says why


@compiled
def _component(v, rest):
    """Take from `rest` its component in the unit vector v, and return it."""
    total = 0.0
    for low in range(0, rest.shape[0], BLOCK):
        total += _dot(v[low : low + BLOCK], rest[low : low + BLOCK])
    number = rest.dtype.type(-total)
    for low in range(0, rest.shape[0], BLOCK):
        _add(number, v[low : low + BLOCK], rest[low : low + BLOCK])
    return total


@compiled
def _projected(chunks, per_chunk, slots, count, row, like, twice, before, w, rest, h, products):
    """Write w without its components `h` in the orthonormal vectors of `count` slots to `rest`; return its norm.

    With `twice` it is projected again where less than `CANCELLED` of `before` is left.
    """
    h[:] = 0.0
    after = before
    for turn in range(2 if twice else 1):
        if turn == 1 and after >= CANCELLED * before:
            break
        source = w if turn == 0 else rest
        _products(chunks, per_chunk, slots, count, source, row, like, products)
        h += products
        products[:] = -products
        _combined(chunks, per_chunk, slots, count, products, source, row, like, rest)
        after = _norm(rest)
    return after


@compiled
def project(w, basis, per_chunk, used, seen, twice, out, h, before, after, start, stop):
    """Write w without its components `h` in the orthonormal basis, and the norms before and after."""
    products = np.empty(h.shape[1])
    slots = np.empty(h.shape[1], np.int64)
    for b in range(start, stop):
        count = _slots(seen[b], used, slots)
        before[b] = _norm(w[b])
        after[b] = _projected(basis, per_chunk, slots, count, b, w, twice, before[b], w[b], out[b], h[b], products)


@compiled
def _factored(factor):
    """Write L and D of the symmetric matrix in the lower triangle of `factor` over it; return whether D is positive."""
    sound = True
    for j in range(factor.shape[0]):
        row = factor[j]
        for i in range(j):
            row[i] -= _dot(factor[i, :i], row[:i])
        pivot = row[j]
        for i in range(j):
            scaled = row[i] / factor[i, i]
            pivot -= scaled * row[i]
            row[i] = scaled
        row[j] = pivot
        sound = sound and pivot > 0.0
    return sound


@compiled
def _substituted(factor, x):
    """Solve L D Lᵀ x = x in place."""
    k = factor.shape[0]
    for i in range(k):
        x[i] -= _dot(factor[i, :i], x[:i])
    for i in range(k):
        x[i] /= factor[i, i]
    for i in range(k - 1, -1, -1):
        _add(-x[i], factor[i, :i], x[:i])


@compiled
def positive(a, b, out, start, stop):
    """Solve a x = b for symmetric positive definite a `(batch, k, k)` and b `(batch, k, r)`, by LDLᵀ.

    Where a pivot is not positive the result is not finite. A system whose right-hand side is zero costs nothing.
    """
    k = a.shape[1]
    factor, x = np.empty((k, k), a.dtype), np.empty(k, a.dtype)
    for s in range(start, stop):
        out[s] = 0.0
        if not np.any(b[s] != 0.0):
            continue
        factor[:] = a[s]
        sound = _factored(factor)
        for r in range(b.shape[2]):
            for i in range(k):
                x[i] = b[s, i, r]
            _substituted(factor, x)
            for i in range(k):
                out[s, i, r] = x[i] if sound else np.nan
