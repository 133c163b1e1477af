"""Timing on a busy machine: tasks in turn, each next to a reference, without disturbed rounds."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Final, Protocol, TypeAlias

from deqcore.bench.machine import Bystanders

TimedTask: TypeAlias = Callable[[], object]
Clock: TypeAlias = Callable[[], float]

LEAST_SECONDS: Final = 0.004  # a shorter task is repeated until it takes this long
MOST_REPEATS: Final = 50
LEAST_ROUNDS: Final = 3
SHARE: Final = 0.05  # of the machine that others may use in a round that counts as undisturbed


class LoadMeter(Protocol):
    """The share of the machine that other processes used, known at the end of its block; see `machine.Bystanders`."""

    share: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a sample, and its least."""

    median: float
    low: float
    high: float
    least: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Summarise at least one number."""
        ordered = sorted(numbers)
        quarters = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
        return cls(statistics.median(ordered), quarters[0], quarters[2], ordered[0])

    @classmethod
    def of_ratios(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Summarise quotients of numbers that were measured in the same rounds, so that drift cancels."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])


@dataclass(frozen=True)
class Rounds:
    """Times of the rounds that were kept, aligned: number i of every list comes from the same round.

    Attributes:
        seconds: per task.
        reference: seconds of one call of the reference, measured just before and after that task.
        returned: what the task returned, the last time in that round.
        disturbance: share of the machine that others used, per kept round (NaN: unknown).
        dropped: rounds that were measured and left out.
    """

    seconds: Mapping[str, list[float]]
    reference: Mapping[str, list[float]]
    returned: Mapping[str, list[object]]
    disturbance: list[float]
    dropped: int


@dataclass(frozen=True)
class _Lap:
    seconds: float
    reference: float
    returned: object


@dataclass(frozen=True)
class _Round:
    share: float
    laps: Mapping[str, _Lap]

    def quiet(self, share: float) -> bool:
        return not self.share > share  # NaN counts as quiet: nothing better is known


def interleave(
    tasks: Mapping[str, TimedTask],
    reference: TimedTask | None = None,
    *,
    rounds: int = 9,
    share: float = SHARE,
    budget: float = 60.0,
    clock: Clock = time.perf_counter,
    watch: Callable[[], AbstractContextManager[LoadMeter]] = Bystanders,
) -> Rounds:
    """Time each task once per round, in rotating order, until enough rounds were undisturbed.

    Args:
        tasks: what is timed, by name, at least one. Each must block until its work is done, and must have run before
            (compiled).
        reference: timed before and after each task, for ratios that drift cancels out of.
        rounds: that are kept.
        share: of the machine that others may use in a round that counts as undisturbed.
        budget: seconds after which the quietest rounds are kept even if they were disturbed.
        clock: seconds.
        watch: makes a context manager that measures how disturbed its block was.
    """
    began = clock()
    repeats = {name: _repeats(task, clock) for name, task in tasks.items()}
    beside = _repeats(reference, clock) if reference else 0
    names, result = list(tasks), []
    for attempt in count():
        turn = attempt % len(names)
        order = names[turn:] + names[:turn]
        with _no_collector(), watch() as others:
            laps = {name: _lap(tasks[name], repeats[name], reference, beside, clock) for name in order}
        result.append(_Round(others.share, laps))
        late = clock() - began > budget and len(result) >= min(rounds, LEAST_ROUNDS)
        if late or sum(item.quiet(share) for item in result) >= rounds:
            break
    kept = _quietest(result, rounds, share)
    return Rounds(
        seconds={name: [item.laps[name].seconds for item in kept] for name in names},
        reference={name: [item.laps[name].reference for item in kept] for name in names},
        returned={name: [item.laps[name].returned for item in kept] for name in names},
        disturbance=[item.share for item in kept],
        dropped=len(result) - len(kept),
    )


def _quietest(candidates: Sequence[_Round], rounds: int, share: float) -> list[_Round]:
    """Return all undisturbed rounds first, then the least disturbed; in the order of time."""
    ranked = sorted(range(len(candidates)), key=lambda i: 0.0 if candidates[i].quiet(share) else candidates[i].share)
    return [candidates[i] for i in sorted(ranked[:rounds])]


def _lap(task: TimedTask, repeats: int, reference: TimedTask | None, beside: int, clock: Clock) -> _Lap:
    before = _time(reference, beside, clock)[0] if reference else math.nan
    seconds, returned = _time(task, repeats, clock)
    after = _time(reference, beside, clock)[0] if reference else math.nan
    return _Lap(seconds, (before + after) / 2, returned)


def _time(task: TimedTask, repeats: int, clock: Clock) -> tuple[float, object]:
    returned: object = None
    start = clock()
    for _ in range(repeats):
        returned = task()
    return (clock() - start) / repeats, returned


def _repeats(task: TimedTask, clock: Clock) -> int:
    once = min(_time(task, 1, clock)[0] for _ in range(2))
    return min(MOST_REPEATS, max(1, math.ceil(LEAST_SECONDS / max(once, 1e-9))))


@contextmanager
def _no_collector() -> Iterator[None]:
    """Disable the garbage collector inside; free what the previous block has left, which is all young."""
    gc.collect(1)
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
