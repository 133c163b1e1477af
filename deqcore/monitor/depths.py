"""The distribution of depth: how many samples, or units of `forward.batch = 2`, took how many steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from deqcore.monitor.sink import Row

BOUNDS: Final = (0, 1, *(least * 2**power for power in range(20) for least in (2, 3)))
"""Bins end at 0, 1, 2, 3, 4, 6, 8, 12, 16, …; see `depths_of`. The same in all rows, so that counts add up."""


def depths_of(steps: Any) -> dict[int, int]:
    """Return the number of units in each bin, by the largest depth of the bin; empty bins are left out.

    Args:
        steps: of each unit, any shape.

    Example:
        >>> depths_of([1, 2, 5, 6, 7])
        {1: 1, 2: 1, 6: 2, 8: 1}
    """
    steps = np.asarray(steps, np.float64).ravel()
    bounds = np.asarray(BOUNDS)
    place = np.minimum(np.searchsorted(bounds, steps), len(bounds) - 1)
    bins, counts = np.unique(place, return_counts=True)
    return {int(bounds[k]): int(count) for k, count in zip(bins, counts, strict=True)}


def depths_by_layer(rows: Iterable[Row]) -> dict[str, Mapping[int, int]]:
    """Return the sum of the rows' distributions for each layer that has one, every bin between its ends included.

    Example:
        >>> depths_by_layer([Row(0, 0, 0.0, {}, depths={2: 3}), Row(1, 1, 0.0, {}, depths={2: 1, 4: 1})])
        {'': {2: 4, 3: 0, 4: 1}}
    """
    sums: dict[str, dict[int, int]] = {}
    for row in rows:
        own = sums.setdefault(row.name, {}) if row.depths else {}
        for bound, count in row.depths.items():
            own[bound] = own.get(bound, 0) + count
    return {name: {k: own.get(k, 0) for k in BOUNDS if min(own) <= k <= max(own)} for name, own in sums.items()}
