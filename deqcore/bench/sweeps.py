"""Curves: residual against evaluations and seconds, and seconds against the number of steps, the batch, the size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from deqcore.bench.cases import Case
from deqcore.bench.compare import Say, counted, evaluation, silent
from deqcore.bench.harness import Contender, Harness, residuals
from deqcore.bench.timing import Clock, interleave

STEPS: Final = 20  # of every solve whose time is plotted against batch or size


@dataclass(frozen=True)
class Point:
    """One solve without a tolerance.

    Attributes:
        framework: the backend.
        case: the problem.
        contender: library and solver.
        batch: samples.
        size: numbers per sample.
        budget: steps that were allowed.
        evaluations: of f.
        residual: largest of the batch, see `harness.residuals`.
        seconds: median of the rounds.
        per_f: seconds of one stand-alone evaluation, median.
    """

    framework: str
    case: str
    contender: str
    batch: int
    size: int
    budget: int
    evaluations: int
    residual: float
    seconds: float
    per_f: float

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return asdict(self)


def points(
    harness: Harness,
    case: Case,
    contenders: Sequence[Contender],
    budgets: Iterable[int],
    *,
    rounds: int = 3,
    seconds: float = 10.0,
    clock: Clock = time.perf_counter,
    say: Say = silent,
) -> list[Point]:
    """Solve with growing step budgets and no tolerance, contenders interleaved.

    Args:
        harness: the framework.
        case: the problem.
        contenders: who takes part.
        budgets: steps allowed, in each library's own units.
        rounds: of timing.
        seconds: budget of time per step budget.
        clock: see `timing.interleave`.
        say: takes messages on progress.
    """
    ready = harness.ready(case)
    shape = ready.z0.shape
    results: list[Point] = []
    for budget in budgets:
        say(f"{harness.name}: {case.name} {tuple(shape)}: {budget} steps")
        solves = {item.name: item.prepare(harness, ready, budget) for item in contenders}
        counts = {item.name: counted(harness, ready, item, solves[item.name], 0.0, budget) for item in contenders}
        tasks = {name: _fixed(solve) for name, solve in solves.items()}
        times = interleave(tasks, evaluation(harness, ready), rounds=rounds, budget=seconds, clock=clock)
        for contender in contenders:
            name = contender.name
            results.append(
                Point(
                    harness.name,
                    case.name,
                    name,
                    int(shape[0]),
                    int(harness.to_numpy(ready.z0)[0].size),
                    budget,
                    counts[name][0],
                    float(residuals(harness, ready, counts[name][1]).max()),
                    _median(times.seconds[name]),
                    _median(times.reference[name]) / harness.queued,
                )
            )
    return results


def _fixed(solve: Callable[[float], object]) -> Callable[[], object]:
    return lambda: solve(0.0)


def _median(numbers: Sequence[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]
