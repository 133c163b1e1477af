"""A solve that drops samples which have stopped gives, bit for bit, what one that keeps them gives."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConfigError, ProblemError
from deqcore.solve.compaction import solve_compacted
from deqcore.solve.loop import iterate
from deqcore.solvers.anderson import Anderson
from deqcore.solvers.broyden import Broyden
from deqcore.solvers.newton_krylov import NewtonKrylov
from deqcore.solvers.picard import Picard
from deqcore.types import StoppingCriteria

SOLVERS = [
    Picard(),
    Anderson(history_size=3),
    Broyden(history_size=5),
    Broyden(history_size=12),
    NewtonKrylov(inner_steps=4),
]
WITH_ESTIMATE = [Anderson(history_size=3), Broyden(history_size=5), Broyden(history_size=12)]
NAMES = ("z", "fz", "residual", "status", "steps", "evaluations")
RATES = np.array([0.1, 0.95, 0.1, 0.5, 0.05, 0.85, 0.1, 0.2, 0.3, 0.1])


def problem(be, dtype="float64", n=6):
    """Elementwise, so that a row's bits do not depend on the others; rows differ in how hard they are."""
    rng = np.random.default_rng(0)
    # Eigenvalues of both signs and several sizes: no method finishes in a step or two.
    rates = RATES[:, None] * np.linspace(-1.0, 1.0, n)[None, :]
    x = rng.standard_normal((len(RATES), n))
    return be.asarray(rates, dtype=dtype), be.asarray(x, dtype=dtype)


def cell(be):
    def f(z, rates, x):
        return rates * be.xp.tanh(z) + x

    return f


def solve(be, solver, compact, control, resume=None, dtype="float64", seen=None):
    rates, x = problem(be, dtype)
    f = cell(be)

    def narrow(rows):
        seen is not None and seen.append(rows.shape[0])
        some = be.take(rates, rows), be.take(x, rows)
        return lambda z: f(z, *some)

    with be.errstate():
        return iterate(be, solver, lambda z: f(z, rates, x), 0 * x, control, resume, narrow if compact else None)


def assert_same(be, a, b):
    for name in NAMES:
        np.testing.assert_array_equal(be.to_numpy(getattr(a, name)), be.to_numpy(getattr(b, name)), name)


@pytest.mark.parametrize(
    "control",
    [StoppingCriteria(1e-10, max_steps=60), StoppingCriteria(1e-10, max_steps=7), StoppingCriteria(0.0, 1e-3)],
)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_results_are_identical(be, solver, control):
    sizes = []
    kept, dropped = solve(be, solver, False, control), solve(be, solver, True, control, seen=sizes)
    assert_same(be, kept, dropped)
    assert sizes == sorted(sizes, reverse=True)
    if control.max_steps > 7:
        assert 1 <= sizes[0] <= 5  # half of them had stopped, or more


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("solver", WITH_ESTIMATE, ids=repr)
def test_estimates_are_identical(be, solver, dtype):
    control = StoppingCriteria(1e-6, max_steps=60)
    kept, dropped = (solve(be, solver, compact, control, dtype=dtype) for compact in (False, True))
    v = be.asarray(np.random.default_rng(1).standard_normal(tuple(kept.z.shape)), dtype=dtype)
    for make in (solver.inverse_jacobian, solver.secant_estimate):
        a, b = make(be, kept.carry.state), make(be, dropped.carry.state)
        for product in ("apply", "apply_transpose"):
            left, right = (be.to_numpy(getattr(h, product)(v)) for h in (a, b))
            assert np.isfinite(left).all()
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("solver", SOLVERS[:4], ids=repr)
def test_a_solve_goes_on_with_or_without(be, solver, second):
    loose, tight = StoppingCriteria(1e-4, max_steps=60), StoppingCriteria(1e-11, max_steps=60)
    kept = solve(be, solver, False, tight, solve(be, solver, False, loose).carry)
    dropped = solve(be, solver, second, tight, solve(be, solver, True, loose).carry)
    assert_same(be, kept, dropped)


def test_a_late_check_changes_nothing(be):
    control = StoppingCriteria(1e-10, max_steps=50)
    for every in (2, 5, 100):
        assert_same(
            be,
            solve(be, Broyden(), False, control),
            solve(be, Broyden(), True, control._replace(check_every=every)),
        )


def test_f_is_evaluated_only_for_samples_that_need_it(be):
    rows = []
    rates, x = problem(be)

    def f(z, rates, x):
        rows.append(z.shape[0])
        return rates * be.xp.tanh(z) + x

    settings = {"forward__solver": "picard", "forward__rtol": 1e-10, "forward__max_steps": 400}
    deqcore.fixed_point(f, 0 * x, rates, x, batched_args=(0, 1), forward__compact=True, **settings)
    dropped = sum(rows)
    rows.clear()
    deqcore.fixed_point(f, 0 * x, rates, x, **settings)
    assert dropped < 0.4 * sum(rows)


def test_trees_of_arguments_keep_their_other_leaves(be):
    rates, x = problem(be)
    states = {"a": 0 * x, "b": 0 * x[:, :2]}
    inputs = {"x": x, "pair": (rates, "a name", 3)}
    shared = be.asarray(np.full((6,), 0.5))

    def f(z, inputs, shared):
        rates, name, number = inputs["pair"]
        assert (name, number) == ("a name", 3)
        b = shared[:2] * be.xp.tanh(z["b"]) + inputs["x"][:, :2]
        return {"a": rates * be.xp.tanh(z["a"]) + inputs["x"] + shared, "b": b}

    settings = {"forward__rtol": 1e-9, "forward__max_steps": 80}
    kept = deqcore.fixed_point(f, states, inputs, shared, **settings)
    dropped = deqcore.fixed_point(f, states, inputs, shared, batched_args=(0,), forward__compact=True, **settings)
    assert bool(kept.converged.all())
    for name in states:
        np.testing.assert_array_equal(be.to_numpy(kept.value[name]), be.to_numpy(dropped.value[name]))


def test_gradients_are_those_without(be):
    rates, x = problem(be)
    g = be.asarray(np.random.default_rng(2).standard_normal(tuple(x.shape)))
    settings = {"forward__rtol": 1e-10, "forward__max_steps": 80, "backward__strategy": "broyden-reuse"}
    kept = deqcore.vjp(cell(be), 0 * x, rates, x, cotangent=g, **settings)
    dropped = deqcore.vjp(
        cell(be), 0 * x, rates, x, cotangent=g, batched_args=(0, 1), forward__compact=True, **settings
    )
    for a, b in zip(kept[1], dropped[1], strict=True):
        # The forward is the same to the last bit; the adjoint's GMRES stops at a tolerance and amplifies rounding.
        np.testing.assert_allclose(be.to_numpy(a), be.to_numpy(b), rtol=1e-5, atol=1e-12)
    np.testing.assert_array_equal(be.to_numpy(kept[0]), be.to_numpy(dropped[0]))


@pytest.mark.parametrize("shape", [(1, 3), (0, 3), (2, 3)])
def test_small_batches(be, shape):
    x = be.asarray(np.ones(shape))
    sol = deqcore.fixed_point(
        lambda z, x: 0.5 * z + x, 0 * x, x, batched_args=(0,), forward__compact=True, forward__solver="picard"
    )
    assert sol.value.shape == shape
    assert bool(sol.converged.all())


def test_one_system_is_never_split(be):
    x = be.asarray(np.ones((4, 3)))
    sol = deqcore.fixed_point(
        lambda z: 0.5 * z + x, 0 * x, forward__compact=True, forward__batch=False, forward__rtol=1e-8
    )
    np.testing.assert_allclose(be.to_numpy(sol.value), 2.0, rtol=1e-7)


def test_an_argument_that_was_not_declared_is_told(be):
    rates, x = problem(be)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each framework has its own, or ours for the shape
        deqcore.fixed_point(cell(be), 0 * x, rates, x, batched_args=(0,), forward__compact=True)
    assert "batched_args" in "".join(getattr(caught.value, "__notes__", []))


def test_samples_that_see_each_other_are_told(be):
    rates, x = problem(be)

    def f(z, rates, x):
        return rates * be.xp.tanh(z) + x + 0.01 * be.xp.mean(x)

    with pytest.raises(ProblemError, match="couple samples"):
        deqcore.fixed_point(f, 0 * x, rates, x, batched_args=(0, 1), forward__compact=True, forward__rtol=1e-8)


@pytest.mark.parametrize("positions", [(2,), (-1,), (0, "x"), (True,)])
def test_positions_that_are_no_arguments(be, positions):
    rates, x = problem(be)
    with pytest.raises(ConfigError, match="positions among the 2 arguments"):
        deqcore.fixed_point(cell(be), 0 * x, rates, x, batched_args=positions, forward__compact=True)


def test_an_argument_with_another_first_axis(be):
    rates, x = problem(be)
    with pytest.raises(ConfigError, match=r"must be the batch of 10 \(got the shape \(6,\)\)"):
        deqcore.fixed_point(cell(be), 0 * x, rates, x[0], batched_args=(0, 1), forward__compact=True)


def test_a_backend_that_traces_refuses():
    jnp = pytest.importorskip("jax.numpy")
    with pytest.raises(ConfigError, match="must be false for the backend 'jax', which traces its loops"):
        deqcore.fixed_point(lambda z: 0.5 * z, jnp.ones((2, 2)), forward__compact=True)


def test_no_step_is_taken_beyond_the_budget(be):
    taken = []

    def advance(f, carry, steps, spare):
        taken.append(steps)
        return carry

    class Fake:
        xp = be.xp

        @staticmethod
        def rows(mask):
            return be.rows(mask)

    class Still:
        status = be.asarray(np.zeros(4, np.int32))
        steps = be.asarray(np.zeros(4, np.int32))

    assert solve_compacted(Fake(), advance, None, None, Still, 0) is Still
    assert taken == [0]
