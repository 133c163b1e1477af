"""What solves cost on NumPy, against a record: a change of steps, evaluations or vjps is seen.

The record says what was, not what is right. After a wanted change, `python tests/core/test_counts.py` writes a new one,
which belongs to the change. Another processor rounds otherwise, so that a count may be off by one, or on the problems
of `CHAOTIC` by as much as the rounding of the inputs moves it.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.testing import strict
from deqcore.testing.problem import rebuild
from deqcore.testing.problems import golden
from deqcore.testing.suite.fixtures import Affine, Kit, affine
from deqcore.testing.suite.strategy.cost_bounds import adjoint_of
from deqcore.testing.suite.strategy.equations import solve_adjoint

RECORD = Path(__file__).with_name("counts.json")

PROBLEMS = (
    "affine", "divergent", "expansive", "ill-conditioned", "mlp", "monotone", "nan", "overshoot", "slow-modes", "walled"
)  # fmt: skip
CHAOTIC = ("divergent", "ill-conditioned")  # their steps follow from rounding
SOLVERS = {
    "picard": [{}, {"damping": 0.5}],
    "anderson": [{}, {"history_size": 3, "max_residual_growth": 1.5}, {"mixing": 0.5}, {"ridge": 1e-3}],
    "broyden": [{}, {"history_size": 5}, {"history_size": 3, "max_residual_growth": 2.0}, {"history_size": 1}],
    "newton-krylov": [{"inner_steps": 6, "forcing": 0.3}, {}, {"inner_steps": 2, "forcing": 0.8, "halvings": 1}],
    "auto": [
        {},
        {"slow": 0.4, "plain_steps": 4, "patience": 3},
        {"history_size": 2, "max_residual_growth": 1.5},
        {"plain_steps": 1, "patience": 1, "escalate": False},
    ],
}
STRATEGIES = {
    "exact-ift": [
        {},
        {"start": "cotangent"},
        {"start": "reuse"},
        {"rtol": 1e-2},
        {"max_steps": 4},
        {"max_steps": 9, "direct": 0},
        {"solver": "anderson", "max_steps": 40},
        {"max_relative_error": 0.1},
        {"max_relative_error": 1e-4, "reuse": "witness"},
        {"max_relative_error": 0.05, "reuse": "precondition"},
        {"max_relative_error": 1e-10},
        {"max_relative_error": 0.5, "max_steps": 7},
        {"start": "reuse", "max_steps": 9, "direct": 0},
        {"solver": "broyden", "max_steps": 30, "start": "zero"},
    ],
    "broyden-reuse": [
        {},
        {"max_relative_error": 1e-3},
        {"max_relative_error": 1e-6, "reuse": "precondition"},
        {"max_relative_error": 1e-3, "max_refine_vjps": 4, "fallback": "none"},
        {"max_relative_error": 1e-3, "max_refine_vjps": 4, "fallback": "exact-ift"},
        {"max_relative_error": None, "fallback": "none"},
        {"max_relative_error": 1e-9, "fallback": "none"},
        {"max_relative_error": 0.3, "reuse": "none", "max_refine_vjps": 12},
        {"max_relative_error": 0.02, "reuse": "precondition", "max_refine_vjps": 3},
    ],
    "neumann": [{}, {"terms": 0}],
}


EPS = 2.0**-52
UNIT = 2.0**-600  # of a state; its square is 0 in float64


def kit(backend="numpy"):
    strict.register()
    return Kit(deqcore.get_backend(backend=backend))


def forward_counts(name, options, problem, unit=1.0, seed=None):
    """Status, steps and evaluations of each sample, at a loose and at a tight tolerance, for z in other units.

    With a seed, each number of the problem is moved by up to 16 units in its last place.
    """
    f, z0, args = kit().data(golden(problem), "float64")
    if seed is not None:
        rng = np.random.default_rng(seed)
        args = tuple(rebuild(tree, lambda x: x * (1 + EPS * rng.integers(-16, 17, np.shape(x)))) for tree in args)
    found = []
    for rtol in (1e-3, 1e-9):
        with np.errstate(all="ignore"):
            sol = kit().solve(
                lambda z, *args: unit * f(z / unit, *args), unit * z0, *args,
                solver=name, rtol=rtol, max_steps=45, options=options,
            )  # fmt: skip
        found += [*sol.status.tolist(), *sol.steps.tolist(), *sol.evaluations.tolist()]
    return found


def problems():
    """Adjoint equations: the golden ones, and random ones with a slow mode or two."""
    for name in ("affine", "conv", "expansive", "ring", "slow-modes", "tree"):
        yield name, *adjoint_of(name)[:2]
    for radius in (0.5, 0.95, 0.999):
        problem = affine(batch=4, n=16, norm=0.5, seed=3)
        problem.a[:, 0, 0] = radius
        problem.a[:, 1, 1] = -0.9 * radius
        yield f"slow {radius}", problem, np.random.default_rng(4).standard_normal((4, 16))
    for n in (1, 2):
        yield f"{n} numbers", affine(batch=2, n=n, norm=0.8), np.ones((2, n))
    expanding = affine(batch=2, n=8, norm=2.5, seed=6)
    yield "expanding", expanding, np.random.default_rng(7).standard_normal((2, 8))
    bad = np.random.default_rng(8).standard_normal((4, 10))
    bad[0], bad[1, 3] = 0.0, np.nan
    singular = affine(batch=4, n=10, norm=0.6, seed=9)
    singular.a[2] = np.eye(10)
    yield "zero, NaN and singular", singular, bad


def estimate_of(problem):
    """An estimate H that is right in most directions and poor in others."""
    n = problem.a.shape[1]
    h = np.linalg.pinv(problem.a - np.eye(n))
    noise = np.random.default_rng(5).standard_normal((n, n)) / n
    return h + h @ noise[None] * 0.5


def backward_counts(name, options, backend="numpy"):
    """Status and vjps of each sample of each problem, and the figures of its report."""
    strategy = plugins.make_strategy(name, options).bind(plugins.make_solver)
    counts, figures = [], []
    for _, problem, g in problems():
        with np.errstate(all="ignore"):
            _, report = solve_adjoint(kit(backend), strategy, Affine(problem.a, 0 * g), g, estimate_of(problem))
        counts += [*report.status.tolist(), *report.vjps.tolist(), *report.fallback.astype(int).tolist()]
        figures += [*report.residual.tolist(), *report.error.tolist()]
    return counts, [None if np.isnan(x) else float(f"{x:.4g}") for x in figures]


def label(name, options):
    return f"{name} {json.dumps(options)}"


FORWARD = [(name, options) for name, every in SOLVERS.items() for options in every]
BACKWARD = [(name, options) for name, every in STRATEGIES.items() for options in every]


def measure():
    """Everything, as it is now."""
    forward = {label(*case): {name: forward_counts(*case, name) for name in PROBLEMS} for case in FORWARD}
    backward = {
        label(*case): dict(zip(("counts", "figures"), backward_counts(*case), strict=True)) for case in BACKWARD
    }
    return {"forward": forward, "backward": backward}


def near(found, recorded):
    """Return whether counts are equal; one in twenty may be off by one."""
    off = np.abs(np.array(found) - np.array(recorded))
    return off.max() <= 1 and np.count_nonzero(off) <= len(off) // 20


def in_reach(found, recorded, moved):
    """Return whether rounding may lead from counts to the record; `moved(seed)` are those of inputs rounded otherwise.

    The range of twelve such runs is widened by itself on both sides.
    """
    runs = np.array([found, *(moved(seed) for seed in range(12))])
    low, high = runs.min(axis=0), runs.max(axis=0)
    width = high - low
    inside = (np.array(recorded) >= low - width) & (np.array(recorded) <= high + width)
    return near(np.where(inside, recorded, found), recorded)


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "options"), FORWARD)
def test_a_solve_takes_as_many_steps_and_evaluations_as_it_did(record, name, options):
    for problem, recorded in record["forward"][label(name, options)].items():
        found = forward_counts(name, options, problem)
        moved = partial(forward_counts, name, options, problem, 1.0)
        same = near(found, recorded) or (problem in CHAOTIC and in_reach(found, recorded, moved))
        assert same, f"{problem}: {found}, recorded {recorded}"


@pytest.mark.parametrize(("name", "options"), FORWARD)
def test_a_solve_in_other_units_takes_as_many_steps(record, name, options):
    """Powers of two change no digit; squares of these numbers are 0, so that each norm and product needs its unit."""
    for problem in ("affine", "nan", "overshoot"):
        found = forward_counts(name, options, problem, UNIT)
        assert near(found, record["forward"][label(name, options)][problem]), f"{problem}: {found}"


@pytest.mark.parametrize("backend", ["numpy", "strict"])
@pytest.mark.parametrize(("name", "options"), BACKWARD)
def test_a_backward_pass_takes_as_many_vjps_and_reports_what_it_did(record, name, options, backend):
    """The strict backend decides as traced code does: nothing is known while the program is made."""
    recorded = record["backward"][label(name, options)]
    counts, figures = backward_counts(name, options, backend)
    assert near(counts, recorded["counts"]), f"{counts}, recorded {recorded['counts']}"
    assert [x is None for x in figures] == [x is None for x in recorded["figures"]], "another figure is measured"
    if counts == recorded["counts"]:
        pairs = [(x, y) for x, y in zip(figures, recorded["figures"], strict=True) if x is not None]
        found, expected = np.array(pairs).reshape(-1, 2).T
        np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-11)


if __name__ == "__main__":
    RECORD.write_text(json.dumps(measure(), separators=(",", ":")) + "\n", encoding="utf-8")
