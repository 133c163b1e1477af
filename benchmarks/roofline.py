"""The least time of a solver's steps on torch: f, and the bytes that a step must move at the memory's speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Final

ARRAY_BYTES: Final = 64 * 2**20  # beyond any cache of the machines at hand
REPEATS: Final = 9

HISTORY: Final[Mapping[str, int]] = {"picard": 0, "anderson": 6, "broyden": 39}
"""Slots of the solvers' histories: their defaults."""

BESIDE: Final[Mapping[str, int]] = {"picard": 2, "anderson": 7, "broyden": 7}
"""States that a step moves beside its history.

All read z and f(z) for the residual. Anderson and Broyden read the last iterate and residual too, and write two vectors
of the history and the next iterate.
"""


def bandwidth() -> float:
    """Return the bytes per second of c = a + b on arrays that no cache holds, the best of nine, all threads in use."""
    import torch

    count = ARRAY_BYTES // 4
    a, b, c = torch.ones(count), torch.ones(count), torch.empty(count)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.add(a, b, out=c)
        seconds.append(time.perf_counter() - start)
    return 3 * ARRAY_BYTES / min(seconds)


def states_moved(solver: str, evaluations: int) -> int:
    """Return how many states the steps of a solve read or write, without those of f.

    Each vector of the history is counted once per step: a step that reads it for inner products and again for the
    combination finds the sample's part in the cache.
    """
    return sum(2 * min(step, HISTORY[solver]) + BESIDE[solver] for step in range(evaluations))


def least_overhead(solver: str, evaluations: int, state: int, reference: list[float], speed: float) -> float:
    """Return seconds over the seconds in f of a solve whose steps move their bytes at full speed.

    Args:
        solver: one of `HISTORY`.
        evaluations: of f.
        state: bytes of one state of the whole batch.
        reference: seconds of one evaluation of f, per round.
        speed: bytes per second, see `bandwidth`.
    """
    inside = evaluations * statistics.median(reference)
    return 1.0 + states_moved(solver, evaluations) * state / speed / inside
