"""Contenders on cases: counts and residuals against closed forms, tolerances, failures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import deqcore
from deqcore.bench import compare as comparing
from deqcore.bench.cases import CASES, SMALL, Case
from deqcore.bench.compare import compare, tune
from deqcore.bench.harness import Contender, Deqcore, Harness, Ready, SolveFunction, SolveOutcome, ours, residuals
from deqcore.bench.rows import BenchRow
from deqcore.bench.sweeps import points
from deqcore.errors import ProblemError
from deqcore.testing.problem import Problem

pytestmark = pytest.mark.usefixtures("small_heap")


@pytest.fixture(scope="module")
def harness() -> Harness:
    return Harness.of(deqcore.get_backend(backend="numpy"), None)


def halving(rtol: float = 1e-3, max_steps: int = 50) -> Case:
    """z/2 + 1 from 0: after k plain steps z = 2(1 − 2^-k), and ‖f(z) − z‖ / ‖f(z)‖ = 2^-(k+1) / (1 − 2^-(k+1))."""

    def f(xp: object, params: object, z: np.ndarray, x: np.ndarray) -> np.ndarray:
        return 0.5 * z + x

    x = np.ones((3, 4), np.float32)
    return Case(Problem("halving", {}, x, 0 * x, f), "halves", rtol, max_steps)


def ratio(k: int) -> float:
    return 2.0 ** -(k + 1) / (1 - 2.0 ** -(k + 1))


class Plain(Contender):
    """Plain iteration whose tolerance is a thousand times the common one; returns z, not f(z)."""

    library = "peer"
    solver = "plain"

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        def run(tolerance: float) -> SolveOutcome:
            z = ready.z0
            for _ in range(max_steps):
                fz = ready.f(z, ready.params, ready.inputs)
                if np.linalg.norm(fz - z) <= 1e-3 * tolerance * np.linalg.norm(fz):
                    break
                z = fz
            return SolveOutcome(z)

        return run


class Broken(Contender):
    library = "peer"
    solver = "broken"

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        raise NotImplementedError("no such method\nat all")


def timeless(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A clock that moves one second whenever it is read."""
    now = iter(range(10**6))
    return lambda: float(next(now))


def test_residuals_are_those_of_the_closed_form(harness: Harness) -> None:
    ready = harness.ready(halving())
    z = np.full((3, 4), 2 * (1 - 2.0**-5), np.float32)
    assert residuals(harness, ready, z) == pytest.approx([ratio(5)] * 3)


def test_rows_hold_counts_residuals_and_ratios(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = [Deqcore("picard"), Plain()]
    rows = compare(harness, halving(), contenders, rounds=2, clock=timeless(monkeypatch), memory=False)
    mine, peer = rows
    # The first k with 2^-(k+1)/(1 − 2^-(k+1)) ≤ 1e-3 is 9: nine steps, ten evaluations.
    assert (mine.contender, mine.evaluations) == ("deqcore picard", 10)
    assert mine.residual_max == pytest.approx(ratio(9), rel=1e-3)
    assert (peer.evaluations, peer.residual_max) == (10, pytest.approx(ratio(9), rel=1e-3))
    assert peer.reached
    assert 1e-3 < peer.tolerance < 10.0  # the loosest on the grid: its own norm is a thousand times tighter
    # Each reading moves the clock by one: a run takes 1 s, so do the references.
    assert mine.seconds == [1.0 / 1] * 2
    assert mine.overhead.median == pytest.approx(1 / 10)
    assert mine.against(peer).median == 1.0


def test_a_contender_that_never_gets_there_is_listed_and_not_timed(harness: Harness) -> None:
    (row,) = compare(harness, halving(max_steps=3), [Plain()], rounds=1, memory=False)
    assert not row.reached
    assert row.seconds == []
    assert row.residual_max == pytest.approx(ratio(3), rel=1e-3)


def test_a_contender_that_raises_costs_the_others_nothing(harness: Harness) -> None:
    rows = compare(harness, halving(), [Broken(), Deqcore("picard")], rounds=1, budget=0.0, memory=False)
    assert rows[0].error == "NotImplementedError: no such method"
    assert not rows[0].reached
    assert rows[1].seconds


def test_a_solve_that_takes_too_long_is_not_searched(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "PATIENCE", 0.0)
    (row,) = compare(harness, halving(), [Plain()], rounds=1, memory=False)
    assert row.error.startswith("TimeoutError: not run: a solve took")
    assert row.seconds == []


class Endless(Contender):
    library = "peer"
    solver = "endless"

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        def solve(tolerance: float) -> SolveOutcome:
            while True:
                time.sleep(0.01)

        return solve


def test_a_solve_without_end_is_cut_off(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "FIRST_PATIENCE", 0.1)
    rows = compare(harness, halving(), [Endless(), Deqcore("picard")], rounds=1, budget=0.0, memory=False)
    assert rows[0].error.startswith("TimeoutError: not run: a solve took more than")
    assert rows[1].seconds


def test_tolerances_are_the_loosest_that_do(harness: Harness) -> None:
    case = halving(rtol=1e-4)
    ready = harness.ready(case)
    tried: list[float] = []

    def solve(tolerance: float) -> SolveOutcome:
        tried.append(tolerance)
        steps = 20 if tolerance < 2e-3 else 2
        return SolveOutcome(np.full((3, 4), 2 * (1 - 2.0**-steps), np.float32))

    assert tune(harness, ready, solve) == pytest.approx(1e-4 * 10**1.25)
    assert len(tried) <= 7
    tried.clear()
    assert tune(harness, ready, solve, few=True) == 1e-4
    assert tried == [1e-4]

    def never(tolerance: float) -> SolveOutcome:
        return SolveOutcome(ready.z0 + 1)

    assert tune(harness, ready, never) == pytest.approx(1e-4 * 10.0**comparing.FINEST)
    assert tune(harness, ready, never, few=True) == pytest.approx(1e-6)


def test_points_follow_the_closed_form(harness: Harness) -> None:
    found = points(harness, halving(), [Deqcore("picard")], [0, 3, 6], rounds=1, seconds=0.0)
    assert [point.evaluations for point in found] == [1, 4, 7]
    assert [point.residual for point in found] == pytest.approx([ratio(k) for k in (0, 3, 6)], rel=1e-3)
    assert {(point.batch, point.size) for point in found} == {(3, 4)}


def test_products_of_a_newton_method_count(harness: Harness) -> None:
    torch = pytest.importorskip("torch")
    del torch
    own = Harness.of(deqcore.get_backend(backend="torch"), "torch")
    (row,) = compare(own, halving(), [Deqcore("newton-krylov")], rounds=1, budget=0.0, memory=False)
    assert row.evaluations >= 3  # f(z0), one product, f(z1): a linear f in one dimension takes one Newton step
    assert row.reached


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_solved_by_broyden_or_newton(harness: Harness, name: str) -> None:
    case = CASES[name](**SMALL)
    ready = harness.ready(case)
    value = Deqcore("broyden").prepare(harness, ready, case.max_steps)(case.rtol).value
    assert residuals(harness, ready, value).max() <= 3 * case.rtol
    assert value.dtype == np.float32
    assert case.name == name


def test_the_mixed_case_has_one_sample_that_takes_ten_times_as_long(harness: Harness) -> None:
    case = CASES["mixed"](batch=8, size=16)
    ready = harness.ready(case)
    steps = np.asarray(
        deqcore.fixed_point(
            ready.f, ready.z0, ready.params, ready.inputs, forward__solver="picard", forward__max_steps=300,
            forward__rtol=1e-5,
        ).steps
    )  # fmt: skip
    assert sorted(steps)[-1] == pytest.approx(10 * np.median(steps), rel=0.15)


def test_compaction_takes_part_where_samples_are_uneven_and_code_is_eager() -> None:
    uneven, even = CASES["mixed"](**SMALL), CASES["dense"](**SMALL)
    assert [each.solver for each in ours(["picard"], uneven, traced=False)] == ["picard", "picard (compact)"]
    assert [each.solver for each in ours(["picard"], uneven, traced=True)] == ["picard"]
    assert [each.solver for each in ours(["picard"], even, traced=False)] == ["picard"]


def test_a_problem_of_another_framework_is_reported(harness: Harness) -> None:
    problem = replace(halving().problem, f={"jax": lambda p, z, x: z})
    with pytest.raises(ProblemError, match="written for jax, not for 'numpy'"):
        harness.ready(Case(problem, ""))


def test_rows_survive_json() -> None:
    row = BenchRow("numpy", "c", "x y", 3, math.nan, 1.0, False, 0.1, 0.2, None, 64, [1.0], [2.0], [math.nan], 1, "oh")
    text = json.dumps(row.as_dict(), allow_nan=False)
    back = BenchRow.of(json.loads(text))
    assert math.isnan(back.residual_max)
    assert math.isnan(back.disturbance[0])
    assert replace(back, residual_max=0.0, disturbance=[]) == replace(row, residual_max=0.0, disturbance=[])
