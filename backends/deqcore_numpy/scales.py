"""The unit of a finite difference: the size of the numbers that it moves, or what f shows of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

FACTOR: Final = 8.0  # between two steps that are compared
PART: Final = 2.0**-9  # of a scale: the step to which it belongs
SCAN: Final = range(-990, 991, 30)  # powers of 2 among which the scale is sought then
STEADY: Final = 1e-3  # relative change of a slope over one factor of a step that counts as none
LINEAR: Final = 1e-6  # and as surely none
MOST_VALUE: Final = 2.0**20  # times the state: what f's value counts at most

Array: TypeAlias = NDArray[Any]
"""An array of float64; masks are arrays of bool."""
Mask: TypeAlias = NDArray[np.bool_]
Function: TypeAlias = Callable[[Array], Array]


def scales(x: Array, value: Array, state: bool) -> tuple[Array, Mask]:
    """Return the scale of each number of `x`, and where it is unknown.

    A number below 1/64 of its sample's largest may be 0 up to rounding, so it takes the largest as its scale.
    """
    size = np.where(np.isfinite(x), np.abs(x), 0.0)
    samples = size.reshape(len(size), -1) if size.ndim > 1 else size.reshape(1, -1)
    most = np.max(samples, axis=1, initial=0.0)
    shown = np.where(np.isfinite(value), np.abs(value), 0.0)
    # An argument may also have one part for each sample; its unit is then unknown, and that of f the best guess.
    alike = value.ndim > 0 and len(value) == len(most)
    own = np.max(shown.reshape(len(shown), -1), axis=1) if alike else np.max(shown)
    blind = most == 0
    if state:  # far from a solution f's value may be too large to be a step of z
        most = np.maximum(most, np.minimum(own, MOST_VALUE * most))
    most = np.where(blind, own, most)
    most = np.where(most == 0, np.max(most) or 1.0, most)
    spread = [-1, *[1] * (size.ndim - 1)] if size.ndim > 1 else [1] * size.ndim
    most, blind = most.reshape(spread), blind.reshape(spread)
    return np.maximum(size, most / 64), np.broadcast_to(blind, size.shape)


def steady_scales(f: Function, x: Array, dx: Array, base: Array, scale: Array, blind: Mask, rows: bool) -> Array:
    """Return `scale`, in which numbers without one get that of long steps with a steady slope of f.

    Args:
        f: see `Differences`, and so are `x` and `rows`.
        x: where.
        dx: a direction in which all numbers move by about as much.
        base: f(x).
        scale: of each number of `x`.
        blind: which numbers have none.
        rows: whether samples are independent.
    """
    unsteady = np.max(_changes(f, x, PART * scale * dx, base, rows), axis=0) > STEADY  # or f is flat: it may overflow
    unsteady = unsteady & (np.any(blind.reshape(len(blind), -1), axis=1) if rows else blind.any())
    if not unsteady.any():
        return scale
    steps = np.asarray([2.0**power for power in SCAN])
    change, bend = np.stack([_changes(f, x, step * dx, base, rows) for step in steps], axis=1)
    steady = change <= np.maximum(np.minimum(4 * np.min(change, axis=0), STEADY), LINEAR)
    smooth = steady & (bend <= STEADY)
    known = np.isfinite(change)  # f changes
    run = np.where(smooth.any(axis=0), smooth, steady)
    best = np.where(run.any(axis=0), _upper_middle_of_first_run(run), np.argmax(known, axis=0))
    fitted, learnt = unsteady & known.any(axis=0), steps[best] / PART
    if rows:
        fitted, learnt = (values.reshape(-1, *[1] * (x.ndim - 1)) for values in (fitted, learnt))
    return np.where(blind & fitted, learnt, scale)


def _changes(f: Function, x: Array, dx: Array, base: Array, rows: bool) -> Array:
    """Return how f's slope changes from a step `dx` to an eighth of it, and from side to side there.

    Relative to the slope, infinite where f does not change: `(2, batch)`, or `(2,)` if samples are not independent.
    """

    def most(y: Array) -> Array:
        return np.asarray(np.max(np.abs(y).reshape(len(y), -1), axis=1) if rows else np.max(np.abs(y)))

    with np.errstate(all="ignore"):
        high, low = (np.asarray(f(x + step * dx)) for step in (1.0 / FACTOR, -1.0 / FACTOR))
        near, bend = FACTOR * (high - low), most(2 * FACTOR * ((high - base) - (base - low)))
        size = most(near)
        sound = np.isfinite(size) & (size > 0)
        if not sound.any():
            return np.full((2, *size.shape), np.inf)
        high, low = (np.asarray(f(x + step * dx)) for step in (1.0, -1.0))
        change = most(near - (high - low))
    sound &= np.isfinite(change)
    return np.stack([np.where(sound, amount / np.where(sound, size, 1.0), np.inf) for amount in (change, bend)])


def _upper_middle_of_first_run(true: Mask) -> Array:
    """Return the index in the middle of the first run of True along the first axis, of two the later one.

    The scan is coarse, so a longer run means that f is as good as linear; its last step may overflow in f's own dtype.
    """
    begun = np.maximum.accumulate(true, axis=0)
    ended = np.maximum.accumulate(begun & ~true, axis=0)
    first, count = np.sum(~begun, axis=0), np.sum(begun & ~ended, axis=0)
    middle: Array = np.where(count > 0, first + count // 2, 0)
    return middle
