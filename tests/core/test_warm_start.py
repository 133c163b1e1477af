"""`state=` of a solve continues, however f has changed: one evaluation says where it stands."""

import numpy as np
import pytest

import deqcore
from deqcore.types import Status

SOLVERS = [
    ("picard", {}),
    ("anderson", {"history_size": 3}),
    ("broyden", {}),
    ("broyden", {"history_size": 5}),
    ("broyden", {"history_size": 5, "max_residual_growth": 2.0}),
    ("newton-krylov", {}),
]
QUIET = {"forward__on_failure": "ignore"}


def counted(be, a):
    calls = []

    def f(z, x):
        calls.append(1)
        return be.xp.tanh(be.xp.sum(a * z[:, None, :], axis=2)) + x

    return f, calls


@pytest.fixture
def problem(be):
    rng = np.random.default_rng(3)
    a = rng.standard_normal((4, 5, 5))
    a *= 0.7 / np.linalg.norm(a, 2, axis=(1, 2))[:, None, None]
    return a, rng.standard_normal((4, 5)), rng.standard_normal((4, 5))


def root(a, x):
    z = np.zeros_like(x)
    for _ in range(400):
        z = np.tanh(np.einsum("bij,bj->bi", a, z)) + x
    return z


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
@pytest.mark.parametrize("first", [0, 2, 7, 60])
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1], []], ids=str)
def test_the_answer_is_that_of_the_new_problem(be, problem, solver, options, first, rows):
    a, x, shift = problem
    other = x.copy()
    other[rows] += shift[rows]
    f, calls = counted(be, be.asarray(a))
    settings = {"forward__solver": solver, "forward__options": options, "forward__rtol": 1e-11, **QUIET}
    start = be.asarray(0 * x)
    before = deqcore.fixed_point(f, start, be.asarray(x), forward__max_steps=first, **settings)
    calls.clear()
    after = deqcore.fixed_point(f, start, be.asarray(other), state=before.state, forward__max_steps=150, **settings)
    z = be.to_numpy(after.value)
    assert z == pytest.approx(root(a, other), rel=1e-8, abs=1e-8)
    assert after.converged.all()
    assert len(calls) >= 1
    true = np.linalg.norm(np.tanh(np.einsum("bij,bj->bi", a, z)) + other - z, axis=1)
    assert be.to_numpy(after.residual) == pytest.approx(true, rel=1e-3, abs=1e-14)


@pytest.mark.parametrize(("solver", "options"), SOLVERS)
def test_a_sample_whose_problem_is_the_same_does_not_see_the_others(be, problem, solver, options):
    if be.name == "torch" and options.get("history_size") == 5:
        pytest.skip("rows that restart apart leave the native step for the portable one, which rounds otherwise")
    a, x, shift = problem
    other = x.copy()
    other[1] += shift[1]
    f, _ = counted(be, be.asarray(a))
    settings = {"forward__solver": solver, "forward__options": options, "forward__rtol": 1e-11, **QUIET}
    before = deqcore.fixed_point(f, be.asarray(0 * x), be.asarray(x), forward__max_steps=3, **settings)

    def on(x):
        return deqcore.fixed_point(f, be.asarray(0 * x), be.asarray(x), state=before.state, **settings)

    same, mixed = on(x), on(other)
    for name in ("value", "residual", "steps", "status", "evaluations"):
        found, expected = (be.to_numpy(getattr(sol, name))[[0, 2, 3]] for sol in (mixed, same))
        assert np.array_equal(found, expected), name


@pytest.mark.parametrize("solver", ["broyden", "anderson", "picard"])
def test_every_evaluation_is_counted(be, problem, solver):
    a, x, shift = problem
    f, calls = counted(be, be.asarray(a))
    settings = {"forward__solver": solver, "forward__max_steps": 4, "forward__rtol": 0.0, **QUIET}
    if be.name == "torch":
        import torch

        torch.set_grad_enabled(False)
    try:
        state = None
        for shifted in (x, x, x + shift, x + shift):
            sol = deqcore.fixed_point(f, be.asarray(0 * x), be.asarray(shifted), state=state, **settings)
            state = sol.state
            assert set(be.to_numpy(sol.evaluations)) == {len(calls)}
            assert set(be.to_numpy(sol.steps)) == {len(calls) - 1 - (len(calls) - 1) // 5}
    finally:
        if be.name == "torch":
            torch.set_grad_enabled(True)


def test_a_loop_over_inputs_follows_them(be):
    """Each call of a sequence starts where the last one ended."""
    f = lambda z, x: 0.5 * z + x
    state, found = None, []
    for value in (1.0, 2.0, -1.0):
        x = be.asarray(np.full((1, 2), value))
        sol = deqcore.fixed_point(f, 0 * x, x, state=state, forward__rtol=1e-10)
        state = sol.state
        found.append(float(be.to_numpy(sol.value)[0, 0]))
    assert found == pytest.approx([2.0, 4.0, -2.0], rel=1e-8)


def test_the_limits_are_those_of_the_new_problem(be):
    """A first residual of 1e-9 would make 1e-3 a blow-up, and the best residual of another f would win for good."""
    f = lambda z, x: 0.5 * z + x
    x = be.asarray(np.full((1, 2), 1e-9))
    small = deqcore.fixed_point(f, 0 * x, x, forward__solver="picard", forward__rtol=1e-4)
    large = deqcore.fixed_point(f, 0 * x, 1e9 * x, state=small.state, forward__solver="picard", forward__rtol=1e-8)
    assert large.converged.all()
    assert be.to_numpy(large.value) == pytest.approx(np.full((1, 2), 2.0), rel=1e-6)


def test_a_failed_sample_starts_again_where_f_has_changed(be):
    f = lambda z, a: a * z + 1
    z0, wild, tame = (be.asarray(np.full((1, 1), v)) for v in (0.0, 3.0, 0.5))
    settings = {"forward__solver": "picard", "forward__max_steps": 60, **QUIET}
    bad = deqcore.fixed_point(f, z0, wild, **settings)
    assert Status(int(bad.status[0])) is Status.DIVERGED
    again = deqcore.fixed_point(f, z0, wild, state=bad.state, **settings)  # at z0 both f are 1
    assert Status(int(again.status[0])) is Status.DIVERGED
    good = deqcore.fixed_point(f, z0, tame, state=bad.state, **settings)
    assert good.converged.all()
    assert be.to_numpy(good.value) == pytest.approx(np.full((1, 1), 2.0), rel=1e-3)


def test_a_gradient_is_that_of_the_new_problem():
    torch = pytest.importorskip("torch")
    a = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    first = deqcore.fixed_point(lambda z, x: a * z + x, 0 * a, a, forward__rtol=1e-10)
    b = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    x = torch.ones_like(a, requires_grad=True)
    sol = deqcore.fixed_point(lambda z, x: b * z + x, 0 * a, x, state=first.state, forward__rtol=1e-10)
    (dx,) = torch.autograd.grad(sol.value.sum(), x)
    assert torch.allclose(sol.value, 1 / (1 - b), rtol=1e-8)
    assert torch.allclose(dx, 1 / (1 - b), rtol=1e-4)


def test_jax_traces_the_new_problem_once():
    jax = pytest.importorskip("jax")
    traces = []

    def f(z, x):
        traces.append(1)
        return 0.5 * jax.numpy.tanh(z) + x

    with jax.enable_x64(True):
        settings = {"forward__rtol": 1e-10, **QUIET}
        solve = jax.jit(lambda x, state: deqcore.fixed_point(f, 0 * x, x, state=state, **settings))
        x = jax.numpy.array([[0.3, 0.4], [1.0, -1.0]])
        sol = solve(x, None)
        before = None
        for step in range(1, 4):
            moved = x.at[0].add(step)
            sol = solve(moved, sol.state)
            before = before or len(traces)
            gap = 0.5 * np.tanh(np.asarray(sol.value)) + np.asarray(moved) - np.asarray(sol.value)
            assert np.abs(gap).max() < 1e-9
            assert sol.converged.all()
            assert int(sol.evaluations[1]) == int(sol.steps[1]) + 1 + step
        assert len(traces) == before
