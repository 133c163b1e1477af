"""Row scaling: norms without overflow, and vectors divided by powers of two before they are multiplied.

These functions need nothing but array operations, so that a backend has no part in them.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from deqcore.abc.arrays import ArrayOps
from deqcore.types import Array

LEAST: Final = 2.0**-126  # the smallest normal number of float32 and bfloat16


def guarded_norm(be: ArrayOps, v: Array, plain_norm: Array) -> Array:
    """Correct `plain_norm` `(batch,)`, norms of the rows of `v` by plain sums, where squares left the range.

    Rows whose norm is too extreme to be squared are scaled and summed a second time. Without such a row (almost
    always) this costs a comparison of `(batch,)` numbers; with zero rows, a search for their largest entry.
    """
    xp, low = be.xp, least_plain_norm(be.xp, plain_norm.dtype)
    host = be.host.numpy_view(plain_norm)
    if host is not None:
        doubtful = ~((host > low) & (host < 1 / low))
        if not np.count_nonzero(doubtful) or not v.shape[1]:
            return plain_norm
        top = be.host.numpy_view(be.numbers.max_abs(v, plain_norm))
        if top is not None and not np.count_nonzero(doubtful & (top > 0) & np.isfinite(top)):
            return plain_norm
    safe = (plain_norm > low) & (plain_norm < 1 / low)
    if be.known_all(safe):
        return plain_norm

    def again(plain_norm: Array) -> Array:
        largest = be.numbers.max_abs(v, plain_norm)
        lost = ~safe & (largest > 0) & xp.isfinite(largest)
        return be.cond(lost, lambda old: xp.where(lost, scaled_norm(be, v, largest), old), plain_norm)

    return be.cond(~safe, again, plain_norm)


def least_plain_norm(xp: Any, dtype: Any) -> float:
    """Return the smallest norm that a plain sum of squares gives to rounding; the largest is its inverse."""
    least: float = _least(xp, dtype) ** (1 / 3)
    return least


def scaled_norm(be: ArrayOps, v: Array, largest: Array) -> Array:
    """Return the 2-norm of each row of `v` in the dtype of `largest` `(batch,)`, from entries divided by it."""
    xp = be.xp
    sound = (largest > 0) & xp.isfinite(largest)
    one = xp.ones_like(largest)
    tiny = float(xp.finfo(largest.dtype).smallest_normal)
    scale = xp.clip(be.numbers.power_of_two(xp.where(sound, largest, one)), tiny, 1 / tiny)
    scaled = be.cast(v, scale) * (1.0 / scale)[:, None]
    square = xp.sum(scaled * scaled, axis=1)
    zero = square == 0  # the root's derivative there is infinite
    return scale * xp.where(zero, square, xp.sqrt(xp.where(zero, xp.ones_like(square), square)))


def row_scale(be: ArrayOps, norm: Array, like: Array) -> Array | None:
    """Return powers of two `(batch,)` that scale rows with these norms to about 1; None if surely none needs it.

    Products of vectors overflow or vanish long before the vectors do: at 1e-25 in float32 all of them are 0. A
    method that stores vectors and forms their products divides them by this scale (`divide_rows`), which changes
    no digit, and multiplies its result by it (`multiply_rows`). The scale is 1 if squares are far from the ends of
    the range, and if the norm is 0 or not finite.

    Args:
        be: whose arrays these are.
        norm: `(batch,)`, as `norm` gives it.
        like: vectors `(batch, n)` of the dtype that will be scaled.
    """
    xp = be.xp
    norm = be.detach(norm)
    low = _least(xp, norm.dtype)
    if norm.dtype != like.dtype:  # the range of what is scaled may be shorter; in that of float16 nothing is far from 1
        low = max(low, min(_least(xp, like.dtype), LEAST))
    low **= 0.125
    host = be.host.numpy_view(norm)
    if host is not None and not np.count_nonzero(_far_from_one(np, host, low)):
        return None
    plain = ~_far_from_one(xp, norm, low)
    if be.known_all(plain):
        return None
    kind = xp.finfo(like.dtype)
    bound = 2.0 ** (math.floor(math.log2(min(1 / float(kind.smallest_normal), float(kind.max)))) - 1)
    one = xp.ones_like(norm)
    return xp.clip(be.numbers.power_of_two(xp.where(plain, one, norm)) * one, 1 / bound, bound)


def divide_rows(be: ArrayOps, v: Array, scale: Array | None) -> Array:
    """Divide each row of `v` `(batch, k)` by its `scale` `(batch,)`, a power of two; None divides by 1."""
    return v if scale is None else v * be.cast(1.0 / scale, v)[:, None]


def multiply_rows(be: ArrayOps, v: Array, scale: Array | None) -> Array:
    """Multiply each row of `v` `(batch, k)` by its `scale` `(batch,)`, a power of two; None multiplies by 1."""
    return v if scale is None else v * be.cast(scale, v)[:, None]


def _least(xp: Any, dtype: Any) -> float:
    """Return the smallest normal number of a dtype."""
    return float(xp.finfo(dtype).smallest_normal)


def _far_from_one(xp: Any, norm: Any, low: float) -> Any:
    """Return which norms `(batch,)` are positive and finite, but outside of `low` to its inverse."""
    return ((norm <= low) | (norm >= 1 / low)) & (norm > 0) & xp.isfinite(norm)
