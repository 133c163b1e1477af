"""Solvers against SciPy, closed forms and textbook methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

import deqcore
from deqcore.errors import ConfigError
from deqcore.solve.loop import iterate
from deqcore.solvers.anderson import Anderson
from deqcore.solvers.broyden import Broyden
from deqcore.solvers.picard import Picard
from deqcore.types import Status, StoppingCriteria

NAMES = ["picard", "anderson", "broyden", "newton-krylov"]


@pytest.fixture(autouse=True)
def _no_warnings_from_f():
    with np.errstate(all="ignore"):
        yield


def cell_map(be, made, rows=slice(None), dtype="float64"):
    w, u, b, x = (be.asarray(a, dtype=dtype) for a in (made.w, made.u, made.b, made.x[rows]))
    inject = be.xp.sum(u[None] * x[:, None, :], axis=2) + b
    return lambda z: be.xp.tanh(be.xp.sum(w[None] * z[:, None, :], axis=2) + inject)


def solve(be, name, f, z0, rtol=1e-11, **settings):
    return deqcore.fixed_point(
        f,
        z0,
        forward__solver=name,
        forward__rtol=rtol,
        forward__max_steps=settings.pop("max_steps", 400),
        forward__options=settings.pop("options", {}),
        forward__on_failure="ignore",
        **settings,
    )


def step_through(be, solver, f, z0, steps):
    """Iterates and states of a solver, without the loop."""
    z = be.asarray(z0)
    fz = f(z)
    state = solver.init(be, z, fz)
    iterates, states = [be.to_numpy(z)], [state]
    for _ in range(steps):
        z, fz, state = solver.step(be, f, z, fz, state)
        iterates.append(be.to_numpy(z))
        states.append(state)
    return iterates, states


def dense(be, h, n, batch=1):
    """The matrices of an estimate, `(batch, n, n)`, from its products with unit vectors; H and (Hᵀ)ᵀ."""
    columns, rows = [], []
    for i in range(n):
        unit = np.zeros((batch, n))
        unit[:, i] = 1.0
        columns.append(be.to_numpy(h.apply(be.asarray(unit))))
        rows.append(be.to_numpy(h.apply_transpose(be.asarray(unit))))
    return np.stack(columns, axis=2), np.stack(rows, axis=1)


# -- against SciPy and closed forms ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 1000))
def test_tanh_cells_agree_with_scipy(be, truth, name, seed):
    made = truth.cell(seed, 3, 6, 4, gain=0.7)
    sol = solve(be, name, cell_map(be, made), be.asarray(np.zeros((3, 6))))
    assert be.to_numpy(sol.converged).all(), sol.summary()
    assert be.to_numpy(sol.value) == pytest.approx(made.root, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 1000), rho=st.floats(0.0, 0.9))
def test_affine_maps_agree_with_the_closed_form(be, truth, name, seed, rho):
    problem = truth.affine(seed, 3, 8, rho)
    sol = solve(be, name, truth.affine_map(be, problem), be.asarray(problem.b))
    assert be.to_numpy(sol.converged).all(), sol.summary()
    scale = np.linalg.norm(np.linalg.inv(np.eye(8) - problem.a), ord=2, axis=(1, 2)).max()
    assert be.to_numpy(sol.value) == pytest.approx(problem.root, rel=1e-9 * scale, abs=1e-9 * scale)
    residual = problem.root - be.to_numpy(sol.value)
    assert np.linalg.norm(residual, axis=1).max() <= 1e-10 * scale * np.linalg.norm(problem.root)


@pytest.mark.parametrize("name", ["anderson", "broyden", "newton-krylov"])
def test_a_map_that_does_not_contract_is_solved(be, name):
    root = scipy.optimize.brentq(lambda z: 3 * np.cos(z) - z, 0, 2, xtol=1e-14)
    sol = solve(be, name, lambda z: 3 * be.xp.cos(z), be.asarray(np.ones((1, 1))), rtol=1e-12)
    assert be.to_numpy(sol.converged).all()
    assert float(be.to_numpy(sol.value)[0, 0]) == pytest.approx(root, rel=1e-11)


def test_plain_iteration_says_that_it_did_not_solve_it(be):
    sol = solve(be, "picard", lambda z: 1 - 2 * z, be.asarray(np.ones((1, 1))))
    assert Status(int(sol.status[0])) is Status.DIVERGED
    assert float(be.to_numpy(sol.residual)[0]) == 2.0  # the start was the best
    assert float(be.to_numpy(sol.value)[0, 0]) == 1.0  # and the value is where that residual was


@pytest.mark.parametrize("name", ["broyden", "newton-krylov"])
def test_affine_maps_that_expand_are_solved(be, truth, name):
    random = truth.rng(0)
    q, _ = np.linalg.qr(random.standard_normal((8, 8)))
    a = np.stack([q @ np.diag(d) @ q.T for d in (np.linspace(-3, 0.5, 8), np.linspace(1.5, 4, 8))])
    b = random.standard_normal((2, 8))
    problem = type("P", (), {"a": a, "b": b})
    root = np.stack([np.linalg.solve(np.eye(8) - a[i], b[i]) for i in range(2)])
    sol = solve(be, name, truth.affine_map(be, problem), be.asarray(0 * b), rtol=1e-10)
    assert be.to_numpy(sol.converged).all(), sol.summary()
    assert be.to_numpy(sol.value) == pytest.approx(root, rel=1e-7)
    if name == "broyden":  # Gay (1979): at most 2n steps on a linear system
        assert be.to_numpy(sol.steps).max() <= 2 * 8 + 2


@given(rate=st.floats(-0.95, 0.95), damping=st.floats(0.1, 1.0))
def test_damped_iteration_has_its_closed_form(be, rate, damping):
    f = lambda z: rate * z + 1.0
    iterates, _ = step_through(be, Picard(damping=damping), f, np.zeros((1, 1)), 6)
    root = 1 / (1 - rate)
    expected = [root - root * (1 - damping * (1 - rate)) ** k for k in range(7)]
    assert [float(z[0, 0]) for z in iterates] == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("start", [1e20, 1.0, -1e-20])
def test_undamped_iteration_is_f_itself_to_the_bit(be, start):
    """z + (f(z) - z) would be 0 at 1e20, or lose the last digits of f(z)."""
    f = lambda z: be.xp.tanh(z) + 0.3
    iterates, _ = step_through(be, Picard(), f, np.full((1, 2), start), 4)
    z = be.asarray(np.full((1, 2), start))
    for found in iterates:
        assert np.array_equal(found, be.to_numpy(z))
        z = f(z)


def test_damping_widens_what_converges(be):
    a = np.diag([-3.0, 0.5])  # eigenvalue −3: plain iteration diverges, τ < 1/2 converges
    f = lambda z: z @ be.asarray(a) + 1.0
    z0 = be.asarray(np.zeros((1, 2)))
    assert not be.to_numpy(solve(be, "picard", f, z0).converged)[0]
    sol = solve(be, "picard", f, z0, options={"damping": 0.4})
    assert be.to_numpy(sol.value) == pytest.approx(np.array([[0.25, 2.0]]), rel=1e-9)


# -- Broyden ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["affine", "cell"])
@given(seed=st.integers(0, 1000))
def test_compact_broyden_is_the_textbook_one(be, truth, kind, seed):
    n, steps = 12, 10
    if kind == "affine":
        problem = truth.affine(seed, 1, n, 0.8)
        f, one = truth.affine_map(be, problem), lambda z: problem.a[0] @ z + problem.b[0]
    else:
        made = truth.cell(seed, 1, n, 3, gain=1.2)
        f, one = cell_map(be, made), lambda z: np.tanh(made.w @ z + made.u @ made.x[0] + made.b)
    z0 = truth.rng(seed).standard_normal(n)
    expected, inverses = truth.broyden(one, z0, steps)
    # What rounding may do to the iterates: as much as it does to the textbook's own.
    shaken, _ = truth.broyden(one, z0 * (1 + 1e-15), steps)
    noise = max(np.abs(a - b).max() for a, b in zip(expected, shaken, strict=True))
    solver = Broyden()
    iterates, states = step_through(be, solver, f, z0[None], steps)
    for k in range(steps + 1):
        scale = max(1.0, np.abs(expected[k]).max())
        assert np.abs(iterates[k][0] - expected[k]).max() <= max(1e-10, 100 * noise) * scale, k
    for k in (0, 1, 5):
        h, transposed = dense(be, solver.inverse_jacobian(be, states[k]), n)
        assert h[0] == pytest.approx(inverses[k], rel=1e-7, abs=1e-7)
        assert transposed[0] == pytest.approx(inverses[k], rel=1e-7, abs=1e-7)


def test_most_seeds_are_benign_enough_for_ten_digits(be, truth):
    """The bound of the test above is 1e-10 itself for ordinary problems."""
    worst = []
    for seed in range(20):
        problem = truth.affine(seed, 1, 12, 0.8)
        expected, _ = truth.broyden(lambda z, p=problem: p.a[0] @ z + p.b[0], np.zeros(12), 10)
        found, _ = step_through(be, Broyden(), truth.affine_map(be, problem), np.zeros((1, 12)), 10)
        worst.append(
            max(np.abs(a[0] - b).max() / np.abs(b).max() for a, b in zip(found[1:], expected[1:], strict=True))
        )
    assert np.median(worst) < 1e-11
    assert sorted(worst)[17] < 1e-10


def secant_errors(be, solver, f, z0, steps):
    """‖H y − s‖ / ‖s‖ of the latest pair after each step, and ‖Hᵀ‖'s agreement with H: ⟨v, H y⟩ = ⟨Hᵀ v, y⟩."""
    z = be.asarray(z0)
    fz = f(z)
    state = solver.init(be, z, fz)
    v = be.asarray(np.random.default_rng(0).standard_normal(z0.shape))
    misses, counts = [], []
    for _ in range(steps):
        new_z, new_fz, state = solver.step(be, f, z, fz, state)
        s, y = new_z - z, (new_fz - new_z) - (fz - z)
        h = solver.inverse_jacobian(be, state)
        misses.append(be.to_numpy(be.norm(h.apply(y) - s) / be.norm(s)))
        left, right = be.inner(v, h.apply(y)), be.inner(h.apply_transpose(v), y)
        scale = be.norm(h.apply(y)) * be.norm(v)
        assert be.to_numpy(be.xp.abs(left - right) / scale).max() < 1e-9
        first = getattr(state, "basis", None)
        counts.append(be.to_numpy((first if first is not None else state.values).count()))
        z, fz = new_z, new_fz
    return np.array(misses), np.array(counts)


@given(seed=st.integers(0, 1000))
def test_the_left_estimate_satisfies_the_secant_equation(be, truth, seed):
    problem = truth.affine(seed, 2, 16, [0.5, 0.9])
    misses, _ = secant_errors(be, Broyden(), truth.affine_map(be, problem), problem.b, 10)
    assert misses.max() < 1e-9


@pytest.mark.parametrize("history_size", [2, 3, 5])
def test_a_restart_when_the_memory_is_full_is_sound(be, truth, history_size):
    """The secant equation still holds after the ring has gone round; overwriting old pairs breaks it at once."""
    problem = truth.affine(7, 2, 16, [0.6, 0.8])
    misses, counts = secant_errors(be, Broyden(history_size=history_size), truth.affine_map(be, problem), problem.b, 12)
    assert counts.max() <= history_size + 1
    assert (counts[1:] <= counts[:-1]).any()  # it did restart
    going = counts > counts.min()
    assert going[history_size + 2 :].any()
    assert misses[going].max() < 1e-9


@pytest.mark.parametrize("history_size", [1, 3])
def test_a_small_memory_converges(be, truth, history_size):
    failed = 0
    for seed in range(10):
        problem = truth.affine(seed, 2, 24, 0.7)
        sol = solve(
            be,
            "broyden",
            truth.affine_map(be, problem),
            be.asarray(0 * problem.b),
            rtol=1e-8,
            max_steps=250,
            options={"history_size": history_size},
        )
        failed += int((~be.to_numpy(sol.converged)).sum())
    assert failed == 0


def test_one_singular_update_spoils_no_batch_mate(be, truth):
    """f(z) = z + const has y = 0: the denominator of sample 0 vanishes at the first update."""
    problem = truth.affine(1, 2, 6, 0.5)
    plain = truth.affine_map(be, problem)
    shift = be.asarray(np.array([[1.0], [0.0]]) * np.ones((2, 6)))
    mask = be.asarray(np.array([[True], [False]]))

    def f(z):
        return be.xp.where(mask, z + shift, plain(z))

    sol = solve(be, "broyden", f, be.asarray(0 * problem.b), rtol=1e-10, max_steps=60)
    assert Status(int(sol.status[0])) is not Status.CONVERGED
    assert np.isfinite(be.to_numpy(sol.value)).all()
    assert Status(int(sol.status[1])) is Status.CONVERGED
    assert be.to_numpy(sol.value)[1] == pytest.approx(problem.root[1], rel=1e-8)


# -- Anderson ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", [1.0, 0.6])
@pytest.mark.parametrize("history_size", [1, 3, 6])
def test_anderson_is_the_textbook_one(be, truth, history_size, mixing):
    close = []
    for seed in range(6):
        problem = truth.affine(seed, 1, 14, 0.8)
        expected = truth.anderson(lambda z, p=problem: p.a[0] @ z + p.b[0], np.zeros(14), 9, history_size, mixing)
        solver = Anderson(history_size=history_size, mixing=mixing, ridge=0.0, max_residual_growth=1e12)
        found, _ = step_through(be, solver, truth.affine_map(be, problem), np.zeros((1, 14)), 9)
        close.append(
            max(np.abs(a[0] - b).max() / np.abs(b).max() for a, b in zip(found[1:], expected[1:], strict=True))
        )
    # Normal equations against orthogonal factors: half the digits where differences are nearly dependent.
    assert np.median(close) < 1e-8
    assert max(close) < 1e-4


def test_anderson_with_full_memory_is_gmres(be, truth):
    """Walker & Ni (2011), Theorem 2.2: on a linear map, f(z̄_k) − z̄_k is the residual of GMRES."""
    problem = truth.affine(11, 1, 10, 0.8)
    a, b = np.eye(10) - problem.a[0], problem.b[0]
    expected = truth.krylov_residuals(a, b, 6)
    iterates, _ = step_through(
        be,
        Anderson(history_size=10, ridge=0.0, max_residual_growth=1e12),
        truth.affine_map(be, problem),
        np.zeros((1, 10)),
        7,
    )
    for k in range(1, 7):  # z_{k+1} = f(z̄_k), so b − A z̄_k = A₀^-1 (z_{k+1} − z*)-free form: g(z̄) = z_{k+1} − z̄
        bar = np.linalg.solve(problem.a[0], iterates[k + 1][0] - problem.b[0])
        assert np.linalg.norm(b - a @ bar) == pytest.approx(expected[k], rel=1e-5)


def test_a_step_that_makes_it_much_worse_leaves_its_own_difference_only(be):
    """Sample 0 meets a cliff that its differences did not announce; sample 1 continues with its own."""
    cliff = be.asarray(np.array([[True], [False]]))
    visited = []

    def f(z):
        visited.append(be.to_numpy(z).copy())
        base = be.xp.concat([0.5 * z[:, 1:] + 1, -0.4 * z[:, :1] + 2], axis=1)
        hit = cliff & (len(visited) == 4)
        return be.xp.where(hit, base + 1e4, base)

    iterates, _ = step_through(be, Anderson(history_size=3, max_residual_growth=10.0), f, np.zeros((2, 2)), 5)
    value = np.array([0.5 * iterates[3][0, 1] + 1, -0.4 * iterates[3][0, 0] + 2]) + 1e4
    before = np.array([0.5 * iterates[2][0, 1] + 1, -0.4 * iterates[2][0, 0] + 2])
    g = value - iterates[3][0]
    dg = g - (before - iterates[2][0])
    expected = value - (value - before) * (dg @ g) / (dg @ dg)  # the secant step through the two latest points
    assert iterates[4][0] == pytest.approx(expected, rel=1e-4)
    plain = np.array([0.5 * iterates[3][1, 1] + 1, -0.4 * iterates[3][1, 0] + 2])
    assert np.abs(iterates[4][1] - plain).max() > 0 or np.abs(plain - iterates[3][1]).max() < 1e-12


@given(seed=st.integers(0, 1000))
def test_andersons_estimate_satisfies_its_latest_secant_equation(be, truth, seed):
    problem = truth.affine(seed, 2, 16, [0.5, 0.8])
    misses, _ = secant_errors(be, Anderson(history_size=4), truth.affine_map(be, problem), problem.b, 8)
    assert misses.max() < 1e-4


# -- histories in a narrower dtype ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["broyden", "anderson"])
def test_a_narrow_history_converges_almost_as_fast(be, truth, name):
    narrow = "bfloat16" if be.capabilities.bfloat16 else "float16"
    problem = truth.affine(3, 4, 64, [0.5, 0.7, 0.8, 0.9])
    f = truth.affine_map(be, problem, dtype="float32")
    z0 = be.asarray(0 * problem.b, dtype="float32")
    wide = solve(be, name, f, z0, rtol=1e-4)
    slim = solve(be, name, f, z0, rtol=1e-4, options={"history_dtype": narrow})
    assert be.to_numpy(slim.converged).all(), slim.summary()
    assert (be.to_numpy(slim.steps) <= 1.7 * be.to_numpy(wide.steps) + 4).all()
    error = np.linalg.norm(be.to_numpy(slim.value) - problem.root, axis=1) / np.linalg.norm(problem.root, axis=1)
    assert error.max() < 2e-2
    assert be.dtype_name(slim.value) == "float32"


def test_an_unfit_history_dtype_is_an_option_error(be):
    for wrong in ("float17", "int32", *(() if be.capabilities.bfloat16 else ("bfloat16",))):
        with pytest.raises(ConfigError, match=f"history_dtype must be float16, .*float64.* .got {wrong!r}"):
            solve(be, "broyden", lambda z: 0.5 * z, be.asarray(np.ones((1, 2))), options={"history_dtype": wrong})


# -- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("broyden", {"history_size": 0}, "history_size must be at least 1 (got 0)"),
        ("anderson", {"history_size": 0}, "history_size must be at least 1 (got 0)"),
        ("anderson", {"mixing": 0.0}, "mixing must be above 0 and at most 1 (got 0.0)"),
        ("anderson", {"ridge": -1.0}, "ridge must be at least 0 (got -1.0)"),
        ("anderson", {"max_residual_growth": 1.0}, "max_residual_growth must be above 1 (got 1.0)"),
        ("picard", {"damping": 0.0}, "damping must be between 0 and 2 (got 0.0)"),
        ("picard", {"damping": 2.0}, "damping must be between 0 and 2 (got 2.0)"),
        ("picard", {"dampning": 0.5}, "no option 'dampning'. Did you mean 'damping'"),
        ("broyden", {"history_size": "many"}, "history_size must be of type int (got 'many')"),
    ],
)
def test_options_out_of_range_are_refused(be, name, options, message):
    with pytest.raises(ConfigError) as caught:
        solve(be, name, lambda z: 0.5 * z, be.asarray(np.ones((1, 2))), options=options)
    assert message in str(caught.value)
    assert repr(name) in str(caught.value)


# -- newton-krylov ----------------------------------------------------------------------------------------------


def test_newton_krylov_solves_a_linear_map_in_few_steps(be, truth):
    problem = truth.affine(2, 3, 12, [0.5, 0.9, 2.0])
    sol = solve(be, "newton-krylov", truth.affine_map(be, problem), be.asarray(0 * problem.b), rtol=1e-9)
    assert be.to_numpy(sol.converged).all(), sol.summary()
    assert be.to_numpy(sol.value) == pytest.approx(problem.root, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_newton_krylov_needs_fewer_evaluations_than_broyden_on_slow_modes(be, seed):
    """The linear model misses nothing in the first step, so that the second is solved to the end."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.standard_normal((96, 96)))
    w = (q * np.concatenate([np.linspace(0.95, 0.99, 20), 0.3 * rng.uniform(-1, 1, 76)])) @ q.T
    b = rng.standard_normal((4, 96))
    a, x = be.asarray(w), be.asarray(b)
    f = lambda z: be.xp.sum(a[None] * z[:, None, :], axis=2) + x
    newton, broyden = (solve(be, name, f, 0.0 * x, rtol=1e-8) for name in ("newton-krylov", "broyden"))
    assert be.to_numpy(newton.steps).max() == 2
    assert be.to_numpy(newton.evaluations).max() < be.to_numpy(broyden.evaluations).max()
    np.testing.assert_allclose(be.to_numpy(newton.value), np.linalg.solve(np.eye(96) - w, b.T).T, atol=1e-4)


# -- the loop with a custom solver ---------------------------------------------------------------------------


@dataclass(frozen=True)
class CountedPicard(Picard):
    """Plain iteration that evaluates f twice a step."""

    evaluations_per_step: ClassVar[int] = 2

    def step(self, backend, f, z, fz, state: Any):
        z = f(fz)
        return z, f(z), state


def test_evaluations_count_what_a_step_costs(be):
    calls = []

    def f(z):
        calls.append(1)
        return 0.5 * z + 1

    forward = iterate(be, CountedPicard(), f, be.asarray(np.zeros((1, 2))), StoppingCriteria(1e-6))
    assert len(calls) == int(forward.evaluations[0]) == 1 + 2 * int(forward.steps[0])


def test_a_state_knows_which_samples_have_the_unit_of_a_new_solve(be):
    """A residual keeps its unit while samples are replaced; one of another size needs another unit."""
    solver, size = Broyden(), np.array([1.0, 2.0**-600, 2.0**600, 3.0])
    z = be.asarray(np.zeros((4, 5)))
    own = solver.init(be, z, be.asarray(size[:, None] * np.ones((4, 5))))
    assert be.to_numpy(solver.started(be, z, own)).tolist() == [True] * 4
    ordinary = solver.init(be, z, be.asarray(np.ones((4, 5))))
    assert be.to_numpy(solver.started(be, z, ordinary)).tolist() == [True] * 4
    for state, other in ((ordinary, own), (own, ordinary)):
        changed = solver.started(be, z, state._replace(norm=other.norm))
        assert be.to_numpy(changed).tolist() == [True, False, False, True]
