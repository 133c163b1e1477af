"""The Pareto front of time and error: what no other choice beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other point beats, by increasing first coordinate.

    A point beats another if it is not larger in both coordinates and smaller in one. Points that are not finite are
    left out; of equal points all are kept.

    Args:
        points: two numbers of which less is better, such as seconds and error.

    Example:
        >>> front([(1.0, 0.5), (2.0, 0.1), (2.0, 0.6), (3.0, 0.1)])
        [0, 1]
    """
    finite = [index for index, point in enumerate(points) if all(map(math.isfinite, point))]
    order = sorted(finite, key=lambda index: points[index])
    result: list[int] = []
    for index in order:
        if not result or points[index][1] < points[result[-1]][1] or points[index] == points[result[-1]]:
            result.append(index)
    return result
