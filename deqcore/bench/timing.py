"""Timing that survives a busy machine: tasks in turn, a reference beside each, disturbed rounds left out."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

from deqcore.bench.machine import Bystanders

Task: TypeAlias = Callable[[], object]
Clock: TypeAlias = Callable[[], float]

LEAST_SECONDS = 0.004  # a shorter task is repeated until it takes this long
MOST_REPEATS = 50
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample, and its least."""

    median: float
    low: float
    high: float
    least: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Of at least one number."""
        ordered = sorted(numbers)
        quarters = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
        return cls(statistics.median(ordered), quarters[0], quarters[2], ordered[0])


@dataclass(frozen=True)
class Rounds:
    """Times of the rounds that were kept, aligned: number i of every list comes from the same round.

    Attributes:
        seconds: per task.
        reference: seconds of one call of the reference, measured just before and after that task.
        disturbance: share of the machine that others used, per kept round (NaN: unknown).
        dropped: rounds that were measured and left out.
    """

    seconds: Mapping[str, list[float]]
    reference: Mapping[str, list[float]]
    disturbance: list[float]
    dropped: int


def interleave(
    tasks: Mapping[str, Task],
    reference: Task | None = None,
    *,
    rounds: int = 9,
    share: float = 0.05,
    budget: float = 60.0,
    clock: Clock = time.perf_counter,
) -> Rounds:
    """Time each task once per round, in rotating order, until enough rounds were undisturbed.

    Args:
        tasks: what is timed, by name. Each must block until its work is done, and must have run before (compiled).
        reference: timed before and after each task, for ratios that drift cancels out of.
        rounds: that are kept.
        share: of the machine that others may use in a round that counts as undisturbed.
        budget: seconds after which the quietest rounds are kept even if they were disturbed.
        clock: `time.process_time` counts processor time instead, which is right for one thread on a machine that
            never is quiet.
    """
    began = time.perf_counter()
    repeats = {name: _repeats(task, clock) for name, task in tasks.items()}
    beside = _repeats(reference, clock) if reference else 0
    found: list[tuple[float, dict[str, tuple[float, float]]]] = []
    names = list(tasks)
    quiet = 0
    for attempt in count():
        turn = attempt % len(names)
        times = {}
        gc.collect()
        gc.disable()
        try:
            with Bystanders() as others:
                for name in names[turn:] + names[:turn]:
                    before = _time(reference, beside, clock) if reference else math.nan
                    seconds = _time(tasks[name], repeats[name], clock)
                    after = _time(reference, beside, clock) if reference else math.nan
                    times[name] = seconds, (before + after) / 2
        finally:
            gc.enable()
        found.append((others.share, times))
        quiet += not others.share > share  # NaN counts as quiet
        late = time.perf_counter() - began > budget and len(found) >= min(rounds, LEAST_ROUNDS)
        if quiet >= rounds or late or (clock is time.process_time and len(found) >= rounds):
            break
    quietest = sorted(range(len(found)), key=lambda i: found[i][0] if found[i][0] > share else 0.0)
    kept = [found[i] for i in sorted(quietest[:rounds])]
    return Rounds(
        seconds={name: [times[name][0] for _, times in kept] for name in names},
        reference={name: [times[name][1] for _, times in kept] for name in names},
        disturbance=[each for each, _ in kept],
        dropped=len(found) - len(kept),
    )


def _time(task: Task, repeats: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repeats):
        task()
    return (clock() - start) / repeats


def _repeats(task: Task, clock: Clock) -> int:
    once = min(_time(task, 1, clock) for _ in range(2))
    return min(MOST_REPEATS, max(1, math.ceil(LEAST_SECONDS / max(once, 1e-9))))
