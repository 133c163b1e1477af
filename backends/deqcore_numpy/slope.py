"""A directional derivative with its estimated error, and the warnings about one that is not reliable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deqcore.errors import DerivativeWarning
from deqcore.solve.user_line import warn

POOR: Final = 1e-4  # relative error that a warning reports

Array: TypeAlias = NDArray[Any]
"""An array of float64, or of complex128 in a complex step; masks are arrays of bool."""


@dataclass(frozen=True)
class Slope:
    """A directional derivative.

    Attributes:
        value: like f's output.
        error: estimated, absolute.
        step: the smallest step of a row, in units of the direction; `(batch, 1)` or a scalar.
        bend: relative difference of the slopes on the two sides where it does not fall with the step, else 0.
        floor: an error that f's own rounding explains.
    """

    value: Array
    error: Array
    step: Array
    bend: Array
    floor: Array


def uncertainty(slope: Slope, base: Array) -> float:
    """Return the largest error relative to its sample's largest slope; a change of f below `NOISE` does not count."""
    error = np.where(np.isfinite(base) & (slope.error > 1e4 * slope.floor), slope.error, 0.0)
    with np.errstate(all="ignore"):
        size = np.where(np.isfinite(slope.value), np.abs(slope.value), 0.0)
        most = np.max(size.reshape(len(size), -1), axis=1) if size.size and size.ndim > 1 else np.max(size, initial=0.0)
        ratio = np.where(error > 0, error / most.reshape(-1, *[1] * (size.ndim - 1)), 0.0)
    return float(np.max(np.where(np.isnan(ratio), np.inf, ratio), initial=0.0))


def warn_if_poor(worst: float) -> None:
    """Warn about a difference whose estimated error is above `POOR`."""
    if worst > POOR:
        warn(
            f"The derivative of f by finite differences is not reliable (estimated relative error {worst:.1e}, limit "
            f"{POOR:.0e}). Compute f in float64 with NumPy operations that take complex numbers, or use a backend "
            f"with automatic differentiation.",
            DerivativeWarning,
        )


def warn_of_bend(bend: float) -> None:
    """Warn about a point where f has two slopes."""
    warn(
        f"f has a kink at this point: its slopes on the two sides differ by {bend:.0%}, and the derivative is their "
        f"mean. Move the point, or use a smooth function.",
        DerivativeWarning,
    )
