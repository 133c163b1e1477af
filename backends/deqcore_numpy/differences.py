"""Finite differences with adaptive steps and an error estimate, and the complex step.

A step has the unit of the number that it moves. It begins at 2^-9 of a *scale*: the size of the number, or of its
sample, or, where all of these are 0, of f's value. From there a ladder of steps leads down (and, where rounding
dominates, up) by factors of 8, until two neighbours agree. Each number of f's output takes the first step at which two
neighbours agree, or else the step of the least error. So a kink, a saturation or a sample of another size nearby does
not matter.

Costs in evaluations of f: 8 a direction where f is smooth at its scale, at most `4 * (DOWN + UP)`; 1 a direction by the
complex step. `Differences.check`, once per linearisation, takes 12 more, at most `2 * (limit + DOWN + 3)`. Where z and
f are 0 it takes 4 more, and `4 * len(SCAN)` if f is not smooth at the scale 1.

Sources: Ridders (1982), "Accurate computation of F'(x) and F'(x)F''(x)"; Squire & Trapp (1998), "Using complex
variables to estimate derivatives of real functions".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deqcore_numpy.scales import scales, steady_scales
from deqcore_numpy.slope import Array, Slope, uncertainty, warn_if_poor, warn_of_bend

START: Final = 2.0**-9  # times the scale
FACTOR: Final = 8.0
DOWN: Final = 14  # steps from the first one down
UP: Final = 8  # and up
COMPLEX: Final = 2.0**-133  # times the scale
GOOD: Final = 1e-8  # relative difference of neighbours that ends the search
FLOOR: Final = 1e-11  # of f's size: a change by less along a natural step is rounding
EPS: Final = float(np.finfo(float).eps)
LEAST: Final = 1e-290

Mask: TypeAlias = NDArray[np.bool_]
Function: TypeAlias = Callable[[Array], Array]


class Differences:
    """Directional derivatives of f at x.

    Args:
        f: from arrays like `x` to arrays; in float64.
        x: float64, any shape.
        rows: whether sample i of f's output depends only on sample i of x; each then takes its own steps.
        state: whether f's output has the unit of `x`, sample by sample.
    """

    def __init__(self, f: Function, x: Array, *, rows: bool = False, state: bool = False) -> None:
        self.f, self.x, self.rows = f, x, rows
        self.base = np.asarray(f(x))
        self.empty = not (x.size and self.base.size)
        scaled = (np.ones(()), np.zeros((), bool)) if self.empty else scales(x, self.base, state)
        self.scale: Array = scaled[0]
        self.blind: Mask = scaled[1]
        self.eps = max(EPS, float(np.finfo(self.base.dtype).eps) if self.base.dtype.kind == "f" else EPS)

    # -- differences --------------------------------------------------------------------------------------------

    def slope(self, dx: Array) -> Slope:
        """Return f'(x)·dx by central differences of fourth order."""
        if self.empty:
            none = np.zeros(self.base.shape)
            return Slope(none, none, np.zeros(()), none, none)
        search = _Search(self, dx)
        for step in self._ladder(search):
            search.at(step)
        return search.result()

    def _ladder(self, search: _Search) -> Iterator[Array]:
        first = START * self.unit(dx=search.dx)
        yield first
        yield first / FACTOR
        rounded = search.rounded()
        for k in range(2, DOWN if (search.open & ~rounded).any() else 0):
            yield first / FACTOR**k
            if not search.open.any():
                return
        # Only against noise: longer steps miss features of f that are smaller than they are.
        rounded |= search.used >= np.abs(self.over(first / FACTOR, self.base))
        search.restart(rounded)
        for k in range(1, UP if (search.open & rounded).any() else 0):
            yield first * FACTOR**k
            if not (search.open & rounded).any():
                break

    def unit(self, dx: Array) -> Array:
        """Return the unit of a step along `dx`: a unit step moves no number by more than its scale."""
        with np.errstate(all="ignore"):
            sizes = np.abs(dx) / self.scale
        most = np.max(sizes.reshape(len(sizes), -1), axis=1, keepdims=True) if self.rows else np.max(sizes)
        return 1.0 / np.where(most > 0, most, 1.0)

    def moved(self, step: Array, dx: Array) -> Array:
        """Return f at x + step·dx."""
        return np.asarray(self.f(self.x + self.over(step, self.x) * dx))

    def over(self, step: Array, like: Array) -> Array:
        """Return the step in a shape that broadcasts with an array."""
        return step.reshape(-1, *[1] * (np.ndim(like) - 1)) if self.rows else step

    # -- complex step -------------------------------------------------------------------------------------------

    def complex_slope(self, dx: Array, step: float = COMPLEX) -> Array:
        """Return f'(x)·dx for analytic code, exact to rounding."""
        h = np.maximum(step * self.unit(dx), LEAST)
        value = np.asarray(self.moved(1j * h, dx))
        return np.imag(value) / self.over(h, value)

    def check(self) -> Rule:
        """Return which rule is right for f at x, by two or four directional derivatives.

        Warns:
            DerivativeWarning: f has a kink at x, or its derivative cannot be found with certainty.
        """
        if self.empty:
            return Rule(self, analytic=False)
        rng = np.random.default_rng(0)
        if self.blind.any():
            dx = rng.choice((-1.0, 1.0), self.x.shape) * rng.uniform(0.5, 1.0, self.x.shape)
            self.scale = steady_scales(self.f, self.x, dx, self.base, self.scale, self.blind, self.rows)
        analytic, worst = True, 0.0
        for size in self._sizes():
            dx = size * rng.choice((-1.0, 1.0), self.x.shape) * rng.uniform(0.5, 1.0, self.x.shape)
            self._find_precision(dx)
            slope = self.slope(dx)
            worst = max(worst, uncertainty(slope, self.base))
            bend = float(np.max(slope.bend, initial=0.0))
            if bend:
                warn_of_bend(bend)
            analytic = analytic and not bend and self._agrees(slope, dx)
        if not analytic:
            warn_if_poor(worst)
        return Rule(self, analytic)

    def _sizes(self) -> list[Array]:
        rows = np.max(self.scale.reshape(len(self.scale), -1), axis=1) if self.x.ndim else self.scale
        wide = np.broadcast_to(rows.reshape(-1, *[1] * (self.x.ndim - 1)) if self.x.ndim else rows, self.x.shape)
        mixed = bool((self.scale < 1e-4 * wide).any())
        return [self.scale, wide] if mixed else [self.scale]

    def _find_precision(self, dx: Array) -> None:
        """Find out whether f computes in float32 inside: random points then give only float32 numbers."""
        steps = np.abs(self.moved(START * self.unit(dx), dx))
        with np.errstate(all="ignore"):
            narrow = np.array_equal(steps, steps.astype(np.float32))
        if narrow and np.unique(steps).size > max(2, steps.size // 2):
            self.eps = max(self.eps, float(np.finfo(np.float32).eps))

    def _agrees(self, slope: Slope, dx: Array) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", np.exceptions.ComplexWarning)  # f discards the imaginary part
                analytic, again = self.complex_slope(dx), self.complex_slope(dx, COMPLEX * 2.0**60)
        except Exception:  # any error of f on complex numbers
            return False
        floor = 10 * slope.floor
        size = np.maximum(np.abs(analytic), np.abs(slope.value))
        finite: Mask = np.isfinite(slope.value) & np.isfinite(self.base)
        if not np.isfinite(analytic[finite]).all() or (np.abs(analytic - again) > GOOD * size + floor)[finite].any():
            return False
        apart = finite & (np.abs(analytic - slope.value) > 10 * slope.error + 1e-6 * size + floor)
        doubtful = finite & (slope.error > 0.05 * size + floor)  # such a difference agrees with every value
        apart |= doubtful
        return not apart.any() or self._nearer(analytic, slope.value, dx, apart)

    def _nearer(self, slope: Array, value: Array, dx: Array, where: Mask) -> bool:
        """Return whether differences tend to `slope` as their steps shrink, as far as rounding allows."""
        gap, seen = np.abs(slope - value), np.zeros(where.shape, bool)
        nearer = np.zeros(where.shape, bool)
        for k in range(DOWN):
            h = START * self.unit(dx) / FACTOR**k
            high, low, over = self.moved(h, dx), self.moved(-h, dx), self.over(h, self.base)
            rounding = 4 * self.eps * np.maximum(np.abs(high), np.abs(low)) / over
            shown = (high - low) / (2 * over)
            sharp = rounding < 0.05 * gap
            nearer = np.where(sharp, np.abs(shown - slope) < 0.25 * np.abs(shown - value), nearer)
            seen |= sharp
        return bool((seen & nearer)[where].all())


class _Search:
    """The best slope so far, number by number of f's output."""

    def __init__(self, at: Differences, dx: Array) -> None:
        self.place, self.dx = at, dx
        shape = at.base.shape
        self.value, self.error = np.full(shape, np.nan), np.full(shape, np.inf)
        self.bend, self.used = np.zeros(shape), np.full(shape, np.inf)
        self.rounding = np.zeros(shape)
        self.done: Mask = ~np.isfinite(at.base)
        self.floor: Array = np.full(shape, np.nan)  # what is below it is rounding of f; known after the first step
        self.last: tuple[Array, Array] | None = None
        self.only = np.ones(shape, bool)
        self.first: tuple[Array, Array] | None = None

    def at(self, step: Array) -> None:
        """Take a step."""
        place = self.place
        over = np.broadcast_to(place.over(step, place.base), self.value.shape)
        high, low = place.moved(step, self.dx), place.moved(-step, self.dx)
        near = (high - low) / (2 * over)
        far = (place.moved(2 * step, self.dx) - place.moved(-2 * step, self.dx)) / (4 * over)
        value = (4 * near - far) / 3
        bend = np.abs((high - place.base) - (place.base - low)) / over
        rounding = 3 * place.eps * np.maximum(np.abs(high), np.abs(low)) / over
        if self.first is None:
            most = np.fmax(np.abs(place.base), np.fmax(np.abs(high), np.abs(low)))
            self.floor = FLOOR * np.where(np.isfinite(most), most, 0.0) / place.over(place.unit(self.dx), place.base)
        if self.last is not None:
            self._take(self.last, (value, bend), rounding, over)
        self.first = (value, bend) if self.first is None else self.first
        self.last = value, bend

    def _take(self, last: tuple[Array, Array], new: tuple[Array, Array], rounding: Array, step: Array) -> None:
        (before, bent), (value, bend) = last, new
        error = np.abs(value - before) + rounding
        error = np.where(np.isfinite(error), error, np.inf)
        # If f is coarse (float32 inside), small steps change nothing, which does not mean a slope of 0.
        trusted = (self.value != 0) & (self.bend == 0) & (self.error <= 1e-2 * np.abs(self.value))
        steady = (bend > 0.5 * bent) & (bent > 0.5 * bend)  # that of a smooth curve falls with the step, by 8
        shown = bend > np.maximum(1e-3 * np.abs(value), 2 * rounding)  # rounding of f alone bends by up to 0.7 of it
        bend = np.where(steady & shown, bend, 0.0)
        lower = self._score(value, error) < self._score(self.value, self.error)
        # A kink that shorter steps do not reach was nearby; the shorter steps must show that beyond rounding.
        past = (bend == 0) & (error < 0.02 * self.bend) & (np.abs(step) < self.used)
        better = np.where((self.bend > 0) & (bend == 0), past, lower) & ~((value == 0) & trusted)
        better &= self.open & self.only
        self.value = np.where(better, value, self.value)
        self.error = np.where(better, error, self.error)
        self.rounding = np.where(better, rounding, self.rounding)
        self.used = np.where(better, np.abs(step), self.used)
        self.bend = np.where(better, bend, self.bend)
        self.done |= better & (bend == 0) & ((error <= GOOD * np.abs(value)) | (error <= self.floor))

    def _score(self, value: Array, error: Array) -> Array:
        """Return the relative error. An absolute one would prefer steps so long that f is flat along them."""
        with np.errstate(all="ignore"):
            score = error / (np.abs(value) + self.floor + error)
        return np.where(error == 0, 0.0, np.where(np.isnan(score), 1.0 + np.isnan(value), score))

    def restart(self, only: Mask) -> None:
        """Change direction: from the first step on for these numbers."""
        self.last, self.only = self.first, only

    @property
    def open(self) -> Mask:
        """Return which numbers have no good slope yet."""
        undone: Mask = ~self.done
        return undone

    def rounded(self) -> Mask:
        """Return where rounding dominates the error, which smaller steps make larger."""
        rounded: Mask = self.error < 2 * self.rounding
        return rounded

    def result(self) -> Slope:
        """Return the best derivative."""
        used = np.where(np.isfinite(self.used), self.used, np.inf)
        least = (
            np.min(used.reshape(len(used), -1), axis=1, keepdims=True, initial=np.inf)
            if self.place.rows
            else np.min(used, initial=np.inf)
        )
        size = np.abs(self.bend) + np.abs(self.value)
        bend = np.divide(self.bend, size, out=np.zeros(size.shape), where=self.bend > 10 * self.error)
        return Slope(self.value, self.error, least, bend, self.floor)


@dataclass
class Rule:
    """A chosen rule, as a function of the direction.

    Attributes:
        at: f and x.
        analytic: whether the complex step is right.
        worst: largest relative error of the differences so far.
    """

    at: Differences
    analytic: bool
    worst: float = 0.0

    def __call__(self, dx: Array) -> Array:
        if self.analytic:
            return self.at.complex_slope(dx)
        slope = self.at.slope(dx)
        self.worst = max(self.worst, uncertainty(slope, self.at.base))
        return slope.value

    def close(self) -> None:
        """Report the largest error of the directions since the last report.

        Warns:
            DerivativeWarning: a difference is not reliable.
        """
        worst, self.worst = self.worst, 0.0
        warn_if_poor(worst)
