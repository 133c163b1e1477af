"""Solver steps as fused Triton kernels for GPUs: few launches, and each vector of the history read twice a step.

Histories come as a table of the addresses of their chunks `(slots, batch, n)`; the mask `seen` `(batch, slots)` marks
the slots that a sample has seen. A program works on one sample and `SPAN` of its numbers for any number of samples, so
that bits do not depend on the batch. Products are summed in the vectors' dtype (at least float32) over a span, and in
float64 over the spans and in all small algebra. Nothing happens to a sample that is not `active`.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

SPAN: Final = 4096  # numbers of a vector per program
PARTS: Final = 8  # spans that are added up at once
UP: Final = tl.constexpr(2.0**512)  # brings numbers whose squares vanish, and with DOWN those whose squares overflow,
DOWN: Final = tl.constexpr(2.0**-512)  # into the range of float64
KERNELS: Final = (
    "dots",
    "combined",
    "broyden_products",
    "broyden_algebra",
    "anderson_products",
    "anderson_algebra",
    "keep",
    "squares",
    "projections",
    "rejected",
    "arnoldi_algebra",
    "arnoldi_vector",
)


@triton.jit
def _rows(chunks, slots, wanted, per_chunk, batch, b, n, kind: tl.constexpr, aligned: tl.constexpr):
    """Find the start of this sample's vectors in `slots`; `aligned` if all start at a multiple of 16 bytes."""
    chunk = tl.load(chunks + slots // per_chunk, mask=wanted, other=0).to(tl.pointer_type(kind))
    rows = chunk + ((slots % per_chunk).to(tl.int64) * batch + b) * n
    return tl.multiple_of(rows, 16) if aligned else rows


@triton.jit
def _each(flag, lanes):
    """Load a flag of the sample as a mask of all `lanes`."""
    return (lanes * 0 + flag) != 0


@triton.jit
def _known(seen, b, slots, used, history_size, has_seen: tl.constexpr):
    """Load the mask of `slots` that this sample has seen."""
    known = slots < used
    if has_seen:
        known = known & (tl.load(seen + b * history_size + slots, mask=slots < history_size, other=0) != 0)
    return known


@triton.jit(do_not_specialize=["batch", "memory", "used", "per_chunk"])
def dots(
    v, chunks, seen, partial, n, batch, history_size, used, per_chunk,
    kind: tl.constexpr, aligned: tl.constexpr, wide: tl.constexpr, has_seen: tl.constexpr,
    slots_at_once: tl.constexpr, block: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Write `partial` (spans, batch, history_size): h_kᵀv over a span, 0 for slots not seen."""
    b, part, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slots = tile * slots_at_once + tl.arange(0, slots_at_once)
    known = _known(seen, b, slots, used, history_size, has_seen)
    rows = _rows(chunks, slots, known, per_chunk, batch, b, n, kind, aligned)
    total = tl.zeros([slots_at_once, block], wide)
    for start in range(part * span, tl.minimum(n, (part + 1) * span), block):
        column = start + tl.arange(0, block)
        inside = column < n
        x = tl.load(v + b * n + column, mask=inside, other=0).to(wide)
        h = tl.load(rows[:, None] + column[None, :], mask=known[:, None] & inside[None, :], other=0).to(wide)
        total += h * x[None, :]
    tl.store(partial + (part * batch + b) * history_size + slots, tl.sum(total, 1), mask=slots < history_size)


@triton.jit(do_not_specialize=["batch", "memory", "used", "per_chunk"])
def combined(
    base, coefficients, chunks, seen, active, stay, out, n, batch, history_size, used, per_chunk,
    kind: tl.constexpr, aligned: tl.constexpr, wide: tl.constexpr,
    has_base: tl.constexpr, has_seen: tl.constexpr, has_active: tl.constexpr,
    slots_at_once: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Write base + Σ c_k h_k of each sample; `stay` for samples that are not active."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < n
    takes_part = 1
    if has_active:
        takes_part = tl.load(active + b).to(tl.int32)
    if takes_part != 0:
        total = tl.zeros([block], wide)
        for first in range(0, used, slots_at_once):
            slots = first + tl.arange(0, slots_at_once)
            known = _known(seen, b, slots, used, history_size, has_seen)
            rows = _rows(chunks, slots, known, per_chunk, batch, b, n, kind, aligned)
            c = tl.load(coefficients + b * history_size + slots, mask=known, other=0).to(wide)
            h = tl.load(rows[:, None] + column[None, :], mask=known[:, None] & inside[None, :], other=0).to(wide)
            total += tl.sum(c[:, None] * h, 0)
        if has_base:
            total += tl.load(base + b * n + column, mask=inside, other=0).to(wide)
        tl.store(out + b * n + column, total.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + b * n + column, tl.load(stay + b * n + column, mask=inside, other=0), mask=inside)


@triton.jit
def _square(x):
    wide = x.to(tl.float64)
    return wide * wide


@triton.jit(do_not_specialize=["batch", "memory", "used", "slot", "per_chunk", "fresh"])
def broyden_products(
    z, fz, unit, chunks, seen, active, partial, squares, n, batch, history_size, used, slot, per_chunk, fresh,
    kind: tl.constexpr, aligned: tl.constexpr, wide: tl.constexpr, has_seen: tl.constexpr,
    slots_at_once: tl.constexpr, block: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Write g = (f(z) − z) / unit into its slot; `partial` as in `dots` for the slots before it.

    `squares` (spans, batch, 3): ‖g‖², gᵀg with g as stored, and ‖f(z)/unit‖², in float64.
    """
    b, part, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    takes_part = tl.load(active + b).to(tl.int32)
    slots = tile * slots_at_once + tl.arange(0, slots_at_once)
    known = _known(seen, b, slots, used, history_size, has_seen) & (slots != slot) & _each(takes_part, slots)
    rows = _rows(chunks, slots, known, per_chunk, batch, b, n, kind, aligned)
    first = tile == 0
    here = _rows(chunks, slot, True, per_chunk, batch, b, n, kind, aligned)
    inverse = 1.0 / tl.load(unit + b).to(tl.float64)
    total = tl.zeros([slots_at_once, block], wide)
    gg, kept, ff = tl.zeros([block], tl.float64), tl.zeros([block], tl.float64), tl.zeros([block], tl.float64)
    for start in range(part * span, tl.minimum(n, (part + 1) * span), block):
        column = start + tl.arange(0, block)
        inside = column < n
        taken = inside & _each(takes_part, column)
        value = tl.load(fz + b * n + column, mask=taken, other=0)
        before = tl.load(z + b * n + column, mask=taken, other=0)
        g = (value.to(wide) - before.to(wide)) * inverse.to(wide)
        h = tl.load(rows[:, None] + column[None, :], mask=known[:, None] & inside[None, :], other=0).to(wide)
        total += h * g[None, :]
        if first:
            stored = g.to(kind)
            tl.store(here + column, stored, mask=inside & _each(takes_part | fresh, column))
            gg += _square(g)
            kept += stored.to(tl.float64) * g.to(tl.float64)
            ff += _square(value.to(tl.float64) * inverse)
    tl.store(partial + (part * batch + b) * history_size + slots, tl.sum(total, 1), mask=slots < history_size)
    if first:
        at = squares + (part * batch + b) * 3
        tl.store(at, tl.sum(gg, 0))
        tl.store(at + 1, tl.sum(kept, 0))
        tl.store(at + 2, tl.sum(ff, 0))


@triton.jit
def _entry(x, lanes, k: tl.constexpr):
    return tl.sum(tl.where(lanes == k, x, 0.0), 0)


@triton.jit
def _added(partial, spans, batch, b, width, j, inside, lanes: tl.constexpr, at_once: tl.constexpr):
    """Sum the entries [span, b, j] over the spans."""
    total = tl.zeros([lanes], tl.float64)
    for first in range(0, spans, at_once):
        part = first + tl.arange(0, at_once)
        at = ((part.to(tl.int64) * batch + b) * width)[:, None] + j[None, :]
        total += tl.sum(
            tl.load(partial + at, mask=(part < spans)[:, None] & inside[None, :], other=0).to(tl.float64), 0
        )
    return total


@triton.jit(do_not_specialize=["spans", "batch", "memory", "used", "slot", "fresh"])
def broyden_algebra(
    partial, squares, spans, seen, active, unit, gram, left, right, pairs, newest, step, norm,
    next_seen, next_newest, next_step, next_norm, size, batch, history_size, used, slot, fresh, eps: tl.constexpr,
    has_seen: tl.constexpr, lanes: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    """Do the small algebra of `deqcore.solvers.broyden` after the products, with the same names."""
    b = tl.program_id(0).to(tl.int64)
    i, j, four = tl.arange(0, lanes), tl.arange(0, lanes), tl.arange(0, 4)
    real, new = j < history_size, j == slot
    own = b * history_size + j
    takes_part = tl.load(active + b).to(tl.int32)
    there = _known(seen, b, j, used, history_size, has_seen)
    known = there & (j != slot)
    tl.store(next_seen + own, tl.where(_each(takes_part, j), known | new, there), mask=real)
    c = tl.load(step + own, mask=real, other=0)
    before = tl.load(newest + own, mask=real, other=0)
    if takes_part != 0:
        found = _added(squares, spans, batch, b, 3, four, four < 3, 4, at_once)
        kept = _entry(found, four, 1)
        d = _added(partial, spans, batch, b, history_size, j, known, lanes, at_once)
        d = tl.where(new, kept, d)
        known_row = _known(seen, b, i, used, history_size, has_seen) & (i != slot)
        tile = ((i.to(tl.int64) * batch + b) * history_size)[:, None] + j[None, :]
        held = known_row[:, None] & real[None, :]
        row = tl.where(new, 0.5 * d, d)
        lower = tl.load(gram + tile, mask=held, other=0)
        w = tl.sum(lower * c[None, :], 1) + tl.sum(lower * c[:, None], 0)  # (L + Lᵀ) c, then the new row's part
        w += tl.where(new, tl.sum(row * c, 0), 0.0) + row * tl.sum(tl.where(new, c, 0.0), 0)
        lefts = tl.load(left + tile, mask=held, other=0)
        rights = tl.load(right + tile, mask=held, other=0)
        u = tl.where(new, 1.0, 0.0) + tl.sum(lefts * tl.sum(rights * d[None, :], 1)[:, None], 0)
        v = c + tl.sum(rights * tl.sum(lefts * w[None, :], 1)[:, None], 0)
        ss, sh = tl.sum(w * c, 0), tl.sum(w * u, 0)
        safe = tl.abs(ss - sh) > eps * ss
        inverse = tl.where(safe, 1.0 / tl.where(safe, ss - sh, 1.0), 0.0)
        scaled = inverse * u
        at = (slot.to(tl.int64) * batch + b) * history_size + j
        tl.store(gram + at, row, mask=real)
        tl.store(left + at, scaled, mask=real)
        tl.store(right + at, v, mask=real)
        pair = (slot.to(tl.int64) * batch + b) * 2 * history_size + j
        tl.store(pairs + pair, c, mask=real)
        tl.store(pairs + pair + history_size, tl.where(new, 1.0, 0.0) - before, mask=real)
        tl.store(next_step + own, u + sh * scaled, mask=real)
        tl.store(next_newest + own, tl.where(new, 1.0, 0.0), mask=real)
        scale = tl.load(unit + b).to(tl.float64)
        tl.store(next_norm + b, (scale * tl.sqrt(_entry(found, four, 0))).to(next_norm.dtype.element_ty))
        tl.store(size + b, (scale * tl.sqrt(_entry(found, four, 2))).to(size.dtype.element_ty))
    else:
        if fresh != 0:
            zero = tl.zeros([lanes], tl.float64)
            at = (slot.to(tl.int64) * batch + b) * history_size + j
            tl.store(gram + at, zero, mask=real)
            tl.store(left + at, zero, mask=real)
            tl.store(right + at, zero, mask=real)
            pair = (slot.to(tl.int64) * batch + b) * 2 * history_size + j
            tl.store(pairs + pair, zero, mask=real)
            tl.store(pairs + pair + history_size, zero, mask=real)
        tl.store(next_step + own, c, mask=real)
        tl.store(next_newest + own, before, mask=real)
        tl.store(next_norm + b, tl.load(norm + b))
        tl.store(size + b, 0.0)


@triton.jit(do_not_specialize=["batch", "memory", "used", "slot", "per_chunk", "fresh"])
def anderson_products(
    z, fz, unit, before_f, before_g, next_g, values, residuals, seen, active, partial, squares,
    n, batch, history_size, used, slot, per_chunk, fresh,
    kind: tl.constexpr, aligned: tl.constexpr, wide: tl.constexpr, has_seen: tl.constexpr,
    slots_at_once: tl.constexpr, block: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Write Δf / unit and Δg into their slots and g = (f(z) − z) / unit; `partial` as in `dots` for earlier Δg.

    `squares` (spans, batch, 4): ‖g‖², ‖Δg‖², gᵀΔg with Δg as stored, and ‖f(z)/unit‖², in float64.
    """
    b, part, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    takes_part = tl.load(active + b).to(tl.int32)
    slots = tile * slots_at_once + tl.arange(0, slots_at_once)
    known = _known(seen, b, slots, used, history_size, has_seen) & (slots != slot) & _each(takes_part, slots)
    rows = _rows(residuals, slots, known, per_chunk, batch, b, n, kind, aligned)
    first = tile == 0
    new_value = _rows(values, slot, True, per_chunk, batch, b, n, kind, aligned)
    new_residual = _rows(residuals, slot, True, per_chunk, batch, b, n, kind, aligned)
    inverse = 1.0 / tl.load(unit + b).to(tl.float64)
    total = tl.zeros([slots_at_once, block], wide)
    gg, dd = tl.zeros([block], tl.float64), tl.zeros([block], tl.float64)
    kept, ff = tl.zeros([block], tl.float64), tl.zeros([block], tl.float64)
    for start in range(part * span, tl.minimum(n, (part + 1) * span), block):
        column = start + tl.arange(0, block)
        inside = column < n
        at = b * n + column
        taken = inside & _each(takes_part, column)
        value = tl.load(fz + at, mask=taken, other=0)
        point = tl.load(z + at, mask=taken, other=0)
        g = (value.to(wide) - point.to(wide)) * inverse.to(wide)
        h = tl.load(rows[:, None] + column[None, :], mask=known[:, None] & inside[None, :], other=0).to(wide)
        total += h * g[None, :]
        if first:
            old_g = tl.load(before_g + at, mask=inside, other=0)
            old_f = tl.load(before_f + at, mask=taken, other=0)
            change = g - old_g.to(wide)
            written = inside & _each(takes_part | fresh, column)
            nothing = tl.zeros([block], kind)
            stored = tl.where(taken, change.to(kind), nothing)
            step = ((value.to(wide) - old_f.to(wide)) * inverse.to(wide)).to(kind)
            tl.store(new_residual + column, stored, mask=written)
            tl.store(new_value + column, tl.where(taken, step, nothing), mask=written)
            tl.store(next_g + at, tl.where(taken, g.to(z.dtype.element_ty), old_g), mask=inside)
            gg += _square(g)
            dd += _square(change)
            kept += stored.to(tl.float64) * g.to(tl.float64)
            ff += _square(value.to(tl.float64) * inverse)
    tl.store(partial + (part * batch + b) * history_size + slots, tl.sum(total, 1), mask=slots < history_size)
    if first:
        at = squares + (part * batch + b) * 4
        tl.store(at, tl.sum(gg, 0))
        tl.store(at + 1, tl.sum(dd, 0))
        tl.store(at + 2, tl.sum(kept, 0))
        tl.store(at + 3, tl.sum(ff, 0))


@triton.jit(do_not_specialize=["spans", "batch", "memory", "used", "slot", "fresh"])
def anderson_algebra(
    partial, squares, spans, seen, active, units, system, scale, target, step, norm,
    next_seen, next_system, next_scale, next_target, next_step, next_norm, size,
    batch, history_size, used, slot, fresh, max_residual_growth, ridge: tl.constexpr,
    has_seen: tl.constexpr, lanes: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    """Do the small algebra of `deqcore.solvers.anderson` after the products, with the same names."""
    b = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, lanes), tl.arange(0, lanes)
    four = tl.arange(0, 4)
    real = j < history_size
    own = b * history_size + j
    tile = (b * history_size + i)[:, None] * history_size + j[None, :]
    inside = (i < history_size)[:, None] & real[None, :]
    takes_part = tl.load(active + b).to(tl.int32)
    new, diagonal = j == slot, i[:, None] == j[None, :]
    unit = tl.where(diagonal, tl.full([lanes, lanes], 1.0 + ridge, tl.float64), 0.0)
    there = _known(seen, b, j, used, history_size, has_seen)
    known = there & (j != slot)
    old_system = tl.load(system + tile, mask=inside, other=0)
    old_scale = tl.load(scale + own, mask=real, other=0)
    old_target = tl.load(target + own, mask=real, other=0)
    old_step = tl.load(step + own, mask=real, other=0)
    old_norm = tl.load(norm + b)
    if takes_part != 0:
        found = _added(squares, spans, batch, b, 4, four, four < 4, 4, at_once)
        length, kept = tl.sqrt(_entry(found, four, 1)), _entry(found, four, 2)
        own_unit = tl.load(units + b).to(tl.float64)
        now = (own_unit * tl.sqrt(_entry(found, four, 0))).to(old_norm.dtype)
        sane = now <= max_residual_growth * old_norm
        learns = old_norm != 0.0  # a step from a residual of 0 gives no difference
        known = known & _each(sane, j)
        old_system = tl.where(sane, old_system, unit)
        old_scale = tl.where(sane, old_scale, 0.0)
        old_target = tl.where(sane, old_target, 0.0)
        result = _added(partial, spans, batch, b, history_size, j, known, lanes, at_once)
        result = tl.where(new, tl.where(learns, kept, 0.0), result)
        inverse = tl.where((length > 0.0) & learns, 1.0 / tl.where(length > 0.0, length, 1.0), 0.0)
        scales = tl.where(new, inverse, old_scale)
        row = tl.where(new, tl.full([lanes], 1.0 + ridge, tl.float64), (result - old_target) * scales * inverse)
        column = tl.sum(tl.where(diagonal, row[None, :], 0.0), 1)
        matrix = tl.where((i == slot)[:, None], row[None, :], old_system)
        matrix = tl.where(new[None, :], column[:, None], matrix)
        tl.store(next_system + tile, matrix, mask=inside)
        tl.store(next_seen + own, known | (new & _each(learns, j)), mask=real)
        tl.store(next_scale + own, scales, mask=real)
        tl.store(next_target + own, result, mask=real)
        # Gauss-Jordan elimination: the system is positive definite with a diagonal of ones.
        matrix = tl.where(inside, matrix, tl.where(diagonal, 1.0, 0.0))
        x = tl.sum(tl.where(diagonal, (result * scales)[None, :], 0.0), 1)  # along rows
        for k in range(0, history_size):
            pivot_row = tl.sum(tl.where((i == k)[:, None], matrix, 0.0), 0)
            pivot_column = tl.sum(tl.where((j == k)[None, :], matrix, 0.0), 1)
            pivot = tl.sum(tl.where(j == k, pivot_row, 0.0), 0)
            known_x = tl.sum(tl.where(i == k, x, 0.0), 0) / pivot
            factor = tl.where(i == k, 0.0, pivot_column)
            matrix = matrix - factor[:, None] * (pivot_row / pivot)[None, :]
            matrix = tl.where((i == k)[:, None], (pivot_row / pivot)[None, :], matrix)
            x = tl.where(i == k, known_x, x - factor * known_x)
        solved = tl.sum(tl.where(diagonal, x[:, None], 0.0), 0)
        solved = solved * -scales
        finite = tl.abs(solved) < float("inf")
        tl.store(next_step + own, tl.where(finite, solved, 0.0), mask=real)
        tl.store(next_norm + b, now)
        tl.store(size + b, (own_unit * tl.sqrt(_entry(found, four, 3))).to(size.dtype.element_ty))
    else:
        tl.store(next_seen + own, there, mask=real)
        tl.store(next_system + tile, old_system, mask=inside)
        tl.store(next_scale + own, old_scale, mask=real)
        tl.store(next_target + own, old_target, mask=real)
        tl.store(next_step + own, old_step, mask=real)
        tl.store(next_norm + b, old_norm)
        tl.store(size + b, 0.0)


@triton.jit(do_not_specialize=["batch"])
def squares(
    z, fz, out, n, batch, wide: tl.constexpr, ranges: tl.constexpr, block: tl.constexpr, span: tl.constexpr
):  # fmt: skip
    """Write `out` (2, spans, batch): ‖f(z) − z‖² and ‖f(z)‖² over a span, in float64.

    With `ranges`, `out` is (6, spans, batch): these two, then those of the numbers times 2^512, and times 2^-512.
    """
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    gg, ff = tl.zeros([block], tl.float64), tl.zeros([block], tl.float64)
    gg_up, ff_up = tl.zeros([block], tl.float64), tl.zeros([block], tl.float64)
    gg_down, ff_down = tl.zeros([block], tl.float64), tl.zeros([block], tl.float64)
    for start in range(part * span, tl.minimum(n, (part + 1) * span), block):
        column = start + tl.arange(0, block)
        value = tl.load(fz + b * n + column, mask=column < n, other=0)
        point = tl.load(z + b * n + column, mask=column < n, other=0)
        g = value.to(wide) - point.to(wide)
        gg += _square(g)
        ff += _square(value)
        if ranges:
            gg_up += _square(g * UP)
            ff_up += _square(value * UP)
            gg_down += _square(g * DOWN)
            ff_down += _square(value * DOWN)
    at, width = out + part * batch + b, tl.num_programs(1) * batch
    tl.store(at, tl.sum(gg, 0))
    tl.store(at + width, tl.sum(ff, 0))
    if ranges:
        tl.store(at + 2 * width, tl.sum(gg_up, 0))
        tl.store(at + 3 * width, tl.sum(ff_up, 0))
        tl.store(at + 4 * width, tl.sum(gg_down, 0))
        tl.store(at + 5 * width, tl.sum(ff_down, 0))


@triton.jit
def _chosen(new, old, out, at, takes, inside):
    """Load new where `takes`, old elsewhere; only one of the two is read."""
    kept = tl.load(old + at, mask=inside & ~takes, other=0)
    tl.store(out + at, tl.where(takes, new, kept), mask=inside)


@triton.jit(do_not_specialize=["patience"])
def keep(
    status, steps, residual, goal, size, reference, best, peak, mark, since,
    next_status, next_steps, next_best, next_peak, next_mark, next_since,
    z, fz, old_z, old_fz, best_z, best_fz, next_z, next_fz, next_best_z, next_best_fz, n, patience, rtol, atol, slack,
    lost: tl.constexpr, hidden: tl.constexpr, tiny: tl.constexpr, most: tl.constexpr, fall: tl.constexpr,
    drop: tl.constexpr, blow_up: tl.constexpr,
    progress: tl.constexpr, refused: tl.constexpr, running: tl.constexpr, converged: tl.constexpr,
    stalled: tl.constexpr, diverged: tl.constexpr, absolute: tl.constexpr, frozen: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Update the status of a sample and its iterates: the new one if the sample is active, and the best one.

    Names and formulas are those of `deqcore.solve.termination`. `goal` is atol + rtol·‖f(z)‖, or atol with `absolute`.
    With `frozen`, z already holds the iterates of samples that are not active.
    """
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    before, now, least = tl.load(status + b), tl.load(residual + b), tl.load(best + b)
    target, length, scale, top = tl.load(goal + b), tl.load(size + b), tl.load(reference + b), tl.load(peak + b)
    marked, waited = tl.load(mark + b), tl.load(since + b)
    active = before == running
    fixed = target if absolute else atol
    near = (now <= target) | (now <= fixed + rtol * (tiny * scale))
    largest = tl.where(top > scale, top, scale)
    height = tl.where(top > 0.0, top, 1.0)
    max_residual_growth = length / tl.where(largest > 0.0, largest, 1.0)
    rounding, unseen = hidden * length, lost * length
    proven = (now < marked) & (tl.where(now > rounding, now, rounding) / height * max_residual_growth <= slack)
    seen = unseen <= most * top
    at_start = (length <= 2.0 * scale) & (now <= fixed + rtol * scale)
    met = tl.where(now > unseen, now, unseen) <= fixed
    floor = tl.where(now > unseen, now, unseen)
    bottom = (fall * floor <= top) & (drop * floor <= marked)
    met = near & ((length <= scale) | at_start | met | (seen & (proven | bottom)))
    escaped = near & (met == 0) & (seen == 0)
    sane = blow_up * now <= scale  # False for NaN, too
    better = (((now < least) & seen) | (met & sane)) & active
    if part == 0:
        moved = now < progress * marked
        finite = tl.abs(now) < float("inf")
        idle = tl.where(moved, 0, tl.where(waited < 0, 0, waited) + 1)
        after = tl.where(met, converged, tl.where(idle < patience, running, stalled))
        after = tl.where(sane & (escaped == 0), after, diverged)
        after = tl.where(finite, after, running)
        tl.store(next_status + b, tl.where(active, after, before))
        tl.store(next_steps + b, tl.load(steps + b) + active.to(tl.int32))
        tl.store(next_best + b, tl.where(better, now, least))
        tl.store(next_peak + b, tl.where(active & sane & (now > top), now, top))
        tl.store(next_mark + b, tl.where(active & moved, now, marked))
        tl.store(next_since + b, tl.where(active, tl.where(finite, idle, refused), waited))
    column = part * block + tl.arange(0, block)
    inside = column < n
    at = b * n + column
    takes, improves = _each(active.to(tl.int32), column), _each(better.to(tl.int32), column)
    point = tl.load(z + at, mask=inside & takes, other=0)
    value = tl.load(fz + at, mask=inside & takes, other=0)
    if frozen == 0:
        _chosen(point, old_z, next_z, at, takes, inside)
    _chosen(value, old_fz, next_fz, at, takes, inside)
    _chosen(point, best_z, next_best_z, at, improves, inside)
    _chosen(value, best_fz, next_best_fz, at, improves, inside)


@triton.jit(do_not_specialize=["batch", "memory", "used", "per_chunk"])
def projections(
    w, chunks, seen, partial, norms, n, batch, history_size, used, per_chunk,
    kind: tl.constexpr, aligned: tl.constexpr, wide: tl.constexpr, has_seen: tl.constexpr,
    slots_at_once: tl.constexpr, block: tl.constexpr, span: tl.constexpr,
):  # fmt: skip
    """Write `partial` as in `dots`, and `norms` (spans, batch): ‖w‖² over a span, in float64."""
    b, part, tile = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slots = tile * slots_at_once + tl.arange(0, slots_at_once)
    known = _known(seen, b, slots, used, history_size, has_seen)
    rows = _rows(chunks, slots, known, per_chunk, batch, b, n, kind, aligned)
    total = tl.zeros([slots_at_once, block], wide)
    null_norm_sq = tl.zeros([block], tl.float64)
    for start in range(part * span, tl.minimum(n, (part + 1) * span), block):
        column = start + tl.arange(0, block)
        inside = column < n
        x = tl.load(w + b * n + column, mask=inside, other=0)
        h = tl.load(rows[:, None] + column[None, :], mask=known[:, None] & inside[None, :], other=0).to(wide)
        total += h * x.to(wide)[None, :]
        if tile == 0:
            null_norm_sq += _square(x)
    tl.store(partial + (part * batch + b) * history_size + slots, tl.sum(total, 1), mask=slots < history_size)
    if tile == 0:
        tl.store(norms + part * batch + b, tl.sum(null_norm_sq, 0))


@triton.jit(do_not_specialize=["spans", "batch", "memory", "used", "per_chunk"])
def rejected(
    w, partial, spans, chunks, seen, out, norms, n, batch, history_size, used, per_chunk,
    kind: tl.constexpr, aligned: tl.constexpr, wide: tl.constexpr, has_seen: tl.constexpr,
    slots_at_once: tl.constexpr, block: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    """Write `out` = w − Σ h_k q_k with the h whose parts are in `partial`; `norms` (blocks, batch): its squares."""
    b, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * block + tl.arange(0, block)
    inside = column < n
    rest = tl.load(w + b * n + column, mask=inside, other=0).to(wide)
    for first in range(0, used, slots_at_once):
        slots = first + tl.arange(0, slots_at_once)
        known = _known(seen, b, slots, used, history_size, has_seen)
        rows = _rows(chunks, slots, known, per_chunk, batch, b, n, kind, aligned)
        c = _added(partial, spans, batch, b, history_size, slots, known, slots_at_once, at_once).to(wide)
        h = tl.load(rows[:, None] + column[None, :], mask=known[:, None] & inside[None, :], other=0).to(wide)
        rest -= tl.sum(c[:, None] * h, 0)
    result = rest.to(out.dtype.element_ty)
    tl.store(out + b * n + column, result, mask=inside)
    tl.store(norms + part * batch + b, tl.sum(tl.where(inside, _square(result), 0.0), 0))


@triton.jit(do_not_specialize=["spans", "blocks", "batch", "memory", "used", "slot", "column", "fresh"])
def arnoldi_algebra(
    first, second, spans, before, after, blocks, basis_seen, columns_seen, columns, source_slot, null_vector,
    null_norm_sq, residual,
    goal, can_grow, steps, next_basis_seen, next_columns_seen, next_source, next_null, next_square, next_residual,
    next_alive, next_steps, height, batch, history_size, used, slot, column, fresh, eps: tl.constexpr,
    twice: tl.constexpr, has_basis_seen: tl.constexpr, has_columns_seen: tl.constexpr,
    lanes: tl.constexpr, at_once: tl.constexpr,
):  # fmt: skip
    """Do the small algebra of `deqcore.linear.gmres` after the projection, with the same names.

    `history_size` is that of the basis. `height` is the divisor of the new vector, negative if it does not enter the
    basis, 0 if nothing changes.
    """
    b = tl.program_id(0).to(tl.int64)
    j, one = tl.arange(0, lanes), tl.arange(0, 1)
    real, following = j < history_size, tl.where(j == slot, 1.0, 0.0).to(tl.float64)
    own = b * history_size + j
    there = _known(basis_seen, b, j, used, history_size, has_basis_seen)
    columns_there = _known(columns_seen, b, j, used - 1, history_size - 1, has_columns_seen)
    nu = tl.load(null_vector + own, mask=real, other=0)
    from_ = tl.load(source_slot + own, mask=real, other=0)
    old_square, old_residual, living = (
        tl.load(null_norm_sq + b),
        tl.load(residual + b),
        tl.load(can_grow + b).to(tl.int32),
    )
    active = (living != 0) & (old_residual > tl.load(goal + b))
    h = _added(first, spans, batch, b, history_size, j, there, lanes, at_once)
    if twice:
        h += _added(second, spans, batch, b, history_size, j, there, lanes, at_once)
    scale = tl.sqrt(tl.sum(_added(before, spans, batch, b, 1, one, one < 1, 1, at_once), 0))
    length = tl.sqrt(tl.sum(_added(after, blocks, batch, b, 1, one, one < 1, 1, at_once), 0))
    floor = 4.0 * eps * scale
    broke = length <= floor
    length = tl.where(broke, floor, length)
    length = tl.where(length == 0.0, 1.0, length)
    overlap = tl.sum(nu * h, 0)
    empty = broke & (tl.abs(overlap) <= 16.0 * floor * tl.sqrt(old_square))
    entry = -overlap / length
    new_square = old_square + entry * entry
    new_residual = old_residual * tl.sqrt(old_square / new_square)
    taken = active & (tl.abs(new_residual) < float("inf")) & (empty == 0)
    going = taken & (broke == 0)
    is_taken, is_going = taken.to(tl.int32), going.to(tl.int32)
    each_taken, each_active = _each(is_taken, j), _each(active.to(tl.int32), j)
    at = (column.to(tl.int64) * batch + b) * 2 * history_size + j
    zero = tl.zeros([lanes], tl.float64)
    stored = real & _each(is_taken | fresh, j)
    tl.store(columns + at, tl.where(each_taken, h + length * following, zero), mask=stored)
    tl.store(columns + at + history_size, tl.where(each_taken, from_, zero), mask=stored)
    tl.store(next_basis_seen + own, there | ((j == slot) & _each(is_going, j)), mask=real)
    short = j < history_size - 1
    tl.store(next_columns_seen + b * (history_size - 1) + j, columns_there | ((j == column) & each_taken), mask=short)
    tl.store(next_source + own, tl.where(each_active, following, from_), mask=real)
    tl.store(next_null + own, tl.where(each_taken, nu + entry * following, nu), mask=real)
    tl.store(next_square + b, tl.where(taken, new_square, old_square))
    tl.store(next_residual + b, tl.where(taken, new_residual, old_residual))
    tl.store(next_alive + b, tl.where(active, is_going, living) != 0)
    tl.store(next_steps + b, tl.load(steps + b) + active.to(tl.int32))
    tl.store(height + b, tl.where(going, length, tl.where(active, -length, 0.0)))


@triton.jit(do_not_specialize=["batch", "slot", "per_chunk", "fresh"])
def arnoldi_vector(
    w, v, height, chunks, out, n, batch, slot, per_chunk, fresh,
    kind: tl.constexpr, aligned: tl.constexpr, wide: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Write w / `height` into the basis and `out`, see `arnoldi_algebra`; elsewhere `out` stays `v`."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < n
    length = tl.load(height + b)
    active, going = (length != 0.0).to(tl.int32), (length > 0.0).to(tl.int32)
    taken = _each(active, column)
    here = _rows(chunks, slot, True, per_chunk, batch, b, n, kind, aligned)
    x = tl.load(w + b * n + column, mask=inside & taken, other=0).to(wide)
    x = x / tl.where(length == 0.0, 1.0, tl.abs(length)).to(wide)
    new = x.to(out.dtype.element_ty)
    kept = tl.load(v + b * n + column, mask=inside & ~taken, other=0)
    tl.store(out + b * n + column, tl.where(taken, new, kept), mask=inside)
    basis = tl.where(_each(going, column), new.to(kind), tl.zeros([block], kind))
    tl.store(here + column, basis, mask=inside & _each(going | fresh, column))
