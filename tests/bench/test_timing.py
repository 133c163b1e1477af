"""Interleaved timing, on a clock that only tasks move."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from deqcore.bench.timing import LEAST_SECONDS, MOST_REPEATS, Spread, interleave


class Machine:
    """A clock in seconds, tasks that take what they say, and others that disturb given rounds."""

    def __init__(self, shares: Callable[[int], float] = lambda _: 0.0) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.shares = shares
        self.round = -1

    def clock(self) -> float:
        return self.now

    def task(self, name: str, seconds: Callable[[int], float] | float, answer: object = None) -> Callable[[], object]:
        def run() -> object:
            self.log.append(name)
            self.now += seconds if isinstance(seconds, float) else seconds(self.round)
            return answer

        return run

    @contextmanager
    def watch(self) -> Iterator[SimpleNamespace]:
        self.round += 1
        self.log.append("|")
        found = SimpleNamespace(share=math.nan)
        yield found
        found.share = self.shares(self.round)

    def rounds(self) -> list[list[str]]:
        """Names in the order in which they ran, without the warm-up."""
        text = " ".join(self.log).split("|")[1:]
        return [part.split() for part in text]


def test_tasks_take_turns_with_the_reference_around_each() -> None:
    machine = Machine()
    tasks = {name: machine.task(name, 1.0) for name in "abc"}
    found = interleave(tasks, machine.task("f", 0.5), rounds=3, clock=machine.clock, watch=machine.watch)
    assert machine.rounds() == [
        ["f", "a", "f", "f", "b", "f", "f", "c", "f"],
        ["f", "b", "f", "f", "c", "f", "f", "a", "f"],
        ["f", "c", "f", "f", "a", "f", "f", "b", "f"],
    ]
    assert found.seconds == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}
    assert found.reference["a"] == [0.5] * 3
    assert found.dropped == 0


def test_disturbed_rounds_are_measured_again_and_left_out() -> None:
    machine = Machine(lambda i: 0.5 if i in (0, 2) else 0.01)
    task = machine.task("a", lambda i: 9.0 if i in (0, 2) else 1.0)
    found = interleave({"a": task}, rounds=3, clock=machine.clock, watch=machine.watch)
    assert found.seconds["a"] == [1.0, 1.0, 1.0]
    assert found.disturbance == [0.01] * 3
    assert found.dropped == 2
    assert all(math.isnan(each) for each in found.reference["a"])


def test_when_the_time_is_up_the_quietest_rounds_stay_in_their_order() -> None:
    shares = [0.9, 0.2, 0.8, 0.3, 0.25, 0.7]
    machine = Machine(lambda i: shares[i])
    task = machine.task("a", lambda i: float(max(i, 0) + 1))
    found = interleave({"a": task}, rounds=3, budget=20.0, clock=machine.clock, watch=machine.watch)
    assert found.disturbance == [0.2, 0.3, 0.25]
    assert found.seconds["a"] == [2.0, 4.0, 5.0]
    assert found.dropped == 3


def test_a_budget_of_nothing_still_gives_the_least_rounds() -> None:
    machine = Machine(lambda _: 1.0)
    found = interleave({"a": machine.task("a", 1.0)}, rounds=9, budget=0.0, clock=machine.clock, watch=machine.watch)
    assert len(found.seconds["a"]) == 3


def test_where_the_disturbance_is_unknown_every_round_counts() -> None:
    machine = Machine(lambda _: math.nan)
    found = interleave({"a": machine.task("a", 1.0)}, rounds=4, clock=machine.clock, watch=machine.watch)
    assert len(found.seconds["a"]) == 4
    assert found.dropped == 0


@pytest.mark.parametrize(("seconds", "repeats"), [(1.0, 1), (LEAST_SECONDS / 8, 8), (1e-7, MOST_REPEATS)])
def test_short_tasks_are_repeated(seconds: float, repeats: int) -> None:
    machine = Machine()
    found = interleave({"a": machine.task("a", seconds)}, rounds=2, clock=machine.clock, watch=machine.watch)
    assert [len(names) for names in machine.rounds()] == [repeats, repeats]
    assert found.seconds["a"] == pytest.approx([seconds] * 2)


def test_what_tasks_return_is_kept_with_their_round() -> None:
    machine = Machine(lambda i: 0.9 if i == 0 else 0.0)
    answers = iter(range(100))

    def task() -> int:
        machine.now += 1.0
        return next(answers)

    found = interleave({"a": task}, rounds=2, clock=machine.clock, watch=machine.watch)
    assert found.returned["a"] == [3, 4]  # two runs before the first round, which was disturbed


def test_spread() -> None:
    found = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.least, found.low, found.median, found.high) == (1.0, 2.0, 3.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0)
    assert Spread.of_ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]).median == 2.0
    with pytest.raises(ValueError, match="shorter"):
        Spread.of_ratios([1.0, 2.0], [1.0])
