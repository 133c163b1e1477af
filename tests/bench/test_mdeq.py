"""The multiscale comparison: the rewritten cell is the same function, and the page says what rows mean. No timing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchdeq")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


def test_the_rewritten_cell_is_the_same_function() -> None:
    from benchmarks.mdeq import CHANNELS, Cell, Rewritten

    torch.manual_seed(1)
    cells = [Cell().double(), Rewritten().double()]
    cells[1].load_state_dict(cells[0].state_dict())
    z, x, g = (
        tuple(torch.randn(2, width, 8 >> k, 8 >> k, dtype=torch.float64) for k, width in enumerate(CHANNELS))
        for _ in range(3)
    )
    z = tuple(part.requires_grad_() for part in z)
    found, gradients = [], []
    for cell in cells:
        y = cell(z, x)
        found.append(y)
        gradients.append(torch.autograd.grad(y, [*z, *cell.parameters()], g))
    for pairs in (zip(*found, strict=True), zip(*gradients, strict=True)):
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("first", "expected"), [(0, 10.0), (3, 2.0), (5, None)])
def test_the_loosest_tolerance_is_found(first: int, expected: float | None) -> None:
    from benchmarks.mdeq import loosest

    grid = (10.0, 8.0, 4.0, 2.0, 1.0)
    assert loosest(grid, lambda tolerance: grid.index(tolerance) >= first) == expected


def test_options_with_the_fewest_evaluations_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import mdeq

    rows: dict[str, dict[str, Any]] = {
        "missed": {"rtol": 1e-4, "residual": 1.0},
        "slow": {"evaluations": 20, "vjps": 12},
        "fast": {"evaluations": 21, "vjps": 10},
        "later": {"evaluations": 20, "vjps": 11},
    }
    monkeypatch.setattr(mdeq, "fitted", lambda problem, make, exact: rows[make])
    row, make = mdeq.best_of(None, {name: name for name in rows}, True)
    assert (row["options"], make) == ("fast", "fast")


@pytest.mark.parametrize("exact", [True, False])
def test_a_gradient_that_promises_nothing_gets_no_tolerance(exact: bool) -> None:
    from benchmarks.mdeq import BACKWARD, FORWARD, fitted

    class Problem:
        cell, x = None, ()

        def residual(self, z: float) -> float:
            return z

        def error(self, solve: Any) -> float:
            given.append(solve.tolerance)
            return 0.9 if solve.tolerance is None else 5 * solve.tolerance

        def evaluations(self, solve: Any) -> tuple[int, int]:
            return 3, 1

    class Solve:
        def __init__(self, cell: Any, rtol: float, tolerance: float | None) -> None:
            self.rtol, self.tolerance = rtol, tolerance

        def __call__(self) -> float:
            return self.rtol

    given: list[float | None] = []
    found = fitted(Problem(), Solve, exact)
    assert found["rtol"] == max(each for each in FORWARD if each <= 1e-3)
    if exact:
        assert found["tolerance"] == max(each for each in BACKWARD if 5 * each <= 0.15)
    else:
        assert given == [None]
        assert (found["tolerance"], found["error"]) == (None, 0.9)


def test_bare_steps_count_what_they_say() -> None:
    from benchmarks.mdeq import CHANNELS, Cell, Problem

    problem = Problem.__new__(Problem)
    problem.cell = Cell()
    problem.x, problem.g = (tuple(torch.randn(1, width, 8 >> k, 8 >> k) for k, width in enumerate(CHANNELS)),) * 2
    steps = lambda *_: problem.bare(problem.cell, 4, 3)
    problem.step = lambda cell, solve: steps()
    assert problem.evaluations(steps) == (4, 3)
    assert all(p.grad is not None for p in problem.cell.parameters())


def row(contender: str, cell: str, seconds: float, exact: bool = True) -> dict[str, Any]:
    return {
        "contender": contender,
        "cell": cell,
        "options": "",
        "exact": exact,
        "rtol": 1e-3,
        "residual": 9e-4,
        "tolerance": 1e-2 if exact else None,
        "error": 0.1 if exact else 0.7,
        "evaluations": 3,
        "vjps": 2,
        "seconds": [seconds] * 3,
    }


@pytest.mark.parametrize("ours", [1.0, 3.0])
def test_only_equal_gradients_and_cells_decide(ours: float) -> None:
    from benchmarks.mdeq import page

    rows = {
        "deqcore a": row("deqcore a", "given", ours),
        "deqcore a, rewritten": row("deqcore a", "rewritten", ours / 2),
        "deqcore c": row("deqcore c", "given", ours / 3, exact=False),
        "deqcore c, rewritten": row("deqcore c", "rewritten", ours / 4, exact=False),
        "torchdeq b": row("torchdeq b", "given", 2.5),
        "torchdeq b, rewritten": row("torchdeq b", "rewritten", 2.0),
        "torchdeq d": row("torchdeq d", "given", 0.1, exact=False),
        "torchdeq d, rewritten": row("torchdeq d", "rewritten", 0.1, exact=False),
        "torchdeq e": {key: value for key, value in row("torchdeq e", "given", 9.0).items() if key != "seconds"},
    }
    machine = {
        "cpu": "X",
        "cores": 1,
        "usable_cores": 1,
        "memory_gib": 1.0,
        "system": "s",
        "python": "3",
        "packages": {},
        "date": "2026-01-01",
        "load_before": [0.0, 0.0, 0.0],
    }
    bare = {"counts": [3, 2], "given": [1.25] * 3, "rewritten": [0.5] * 3}
    found = {"machine": machine, "clock": "perf_counter", "parameters": 7, "rows": rows, "disturbance": [0.0]}
    text, met = page(found | {"bare": bare})
    assert "take 1250 ms with the cell as given and 500 ms with the rewritten one" in text
    assert "is 2.00 and 5.00 times that" in text
    assert met is (ours == 1.0)
    assert f"| {2.5 / ours:.2f} | {'met' if met else 'missed'} |" in text
    assert f"| at equal residual alone | rewritten | rewritten | deqcore c | 0.70 | {8.0 / ours:.2f} | met |" in text
    assert f"the target is {'met' if met else 'missed'}" in text
    assert "not reached: gradient's error 0.10" in text
