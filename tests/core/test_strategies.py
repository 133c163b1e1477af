"""Backward strategies against closed forms, central differences and independently computed estimates."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

import deqcore
from deqcore import plugins
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.errors import ConfigError, StrategyError
from deqcore.solve.adjoint import Adjoint
from deqcore.solve.loop import iterate
from deqcore.solvers.broyden import Broyden
from deqcore.types import Status, StoppingCriteria

PLAIN = {"certify": False, "max_relative_error": None, "fallback": "none"}
TIGHT = {"forward__rtol": 1e-13, "forward__max_steps": 300, "forward__on_failure": "ignore"}


@pytest.fixture(autouse=True)
def _nan_is_no_warning():
    with np.errstate(all="ignore"):
        yield


def cell(be):
    """The tanh cell with its parameters as a dict, an input, and an argument that it does not use."""

    def f(z, p, x, unused):
        xp = be.xp
        return xp.tanh(xp.matmul(z, p["w"].T) + xp.matmul(x, p["u"].T) + p["b"][0])

    return f


def cell_vjp(be, made, g, **settings):
    """Gradients of Σ g·z* by `deqcore.vjp`, as NumPy arrays."""
    p = {"w": be.asarray(made.w), "u": be.asarray(made.u), "b": [be.asarray(made.b)]}
    z0, unused = be.asarray(np.zeros((made.batch, made.n))), be.asarray(np.ones(2))
    z, (dp, dx, du) = deqcore.vjp(
        cell(be), z0, p, be.asarray(made.x), unused, cotangent=be.asarray(g), **(TIGHT | settings)
    )
    assert not be.to_numpy(du).any()
    return be.to_numpy(z), {
        "w": be.to_numpy(dp["w"]),
        "u": be.to_numpy(dp["u"]),
        "b": be.to_numpy(dp["b"][0]),
        "x": be.to_numpy(dx),
    }


def close(found, expected, rtol):
    for name, value in found.items():
        other = getattr(expected, name)
        assert np.abs(value - other).max() <= rtol * np.abs(other).max(), name


def affine_u(be, problem, g, **settings):
    """u itself: with f(z, b) = A z + b the gradient of b is u."""
    a = be.asarray(problem.a)
    f = lambda z, b: be.xp.sum(a * z[:, None, :], axis=2) + b
    z0 = be.asarray(0 * problem.b)
    if settings.get("backward__strategy") == "broyden-reuse":
        settings = {"forward__solver": "broyden"} | settings
    _, (u,) = deqcore.vjp(
        f, z0, be.asarray(problem.b), cotangent=be.asarray(g), **({"forward__on_failure": "ignore"} | settings)
    )
    return be.to_numpy(u)


def solve_adjoint(be, name, problem, g, estimate=None, **options):
    """One call of a strategy's `solve_adjoint` with J = A, and how often it pulled."""
    strategy = plugins.make_strategy(name, options)
    strategy = strategy.bind(plugins.make_solver)
    a, vjps = be.asarray(problem.a), []

    def vjp(u):
        vjps.append(1)
        return be.xp.sum(a * u[:, :, None], axis=1)

    u, report = strategy.solve_adjoint(be, vjp, be.asarray(g), estimate)
    return be.to_numpy(u), type(report)(*(be.to_numpy(leaf) for leaf in report)), len(vjps)


def adjoint_residual(problem, g, u):
    r = g + np.einsum("bij,bi->bj", problem.a, u) - u
    return np.linalg.norm(r, axis=1) / np.linalg.norm(g, axis=1)


def exact(problem, g):
    return np.stack([np.linalg.solve((np.eye(problem.n) - problem.a[i]).T, g[i]) for i in range(problem.batch)])


# -- exact-ift --------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 1000))
def test_exact_gradients_are_the_closed_form(be, truth, seed):
    made = truth.cell(seed, 3, 5, 4)
    g = truth.rng(seed + 1).standard_normal((3, 5))
    z, found = cell_vjp(be, made, g, backward__options={"rtol": 1e-12})
    assert z == pytest.approx(made.root, rel=1e-10, abs=1e-12)
    close(found, truth.cell_gradients(made, g), 1e-8)


def test_exact_gradients_are_central_differences_of_scipys_root(be, truth):
    made = truth.cell(4, 2, 4, 3)
    g = truth.rng(5).standard_normal((2, 4))
    _, found = cell_vjp(be, made, g, backward__options={"rtol": 1e-12})

    def loss(**changed):
        other = type(made)(**(vars(made) | changed))
        return sum(g[i] @ truth.cell_root(other, other.x[i]) for i in range(2))

    for name in ("w", "u", "b", "x"):
        expected = truth.central(lambda value, name=name: loss(**{name: value}), getattr(made, name))
        assert np.abs(found[name] - expected).max() <= 1e-8 * np.abs(expected).max(), name


@pytest.mark.parametrize("forward", ["picard", "anderson", "broyden", "newton-krylov"])
@pytest.mark.parametrize("backward", ["gmres", "picard", "anderson", "broyden"])
def test_every_pair_of_solvers_gives_the_exact_gradient(be, truth, forward, backward):
    made = truth.cell(7, 2, 5, 3, gain=0.6)
    g = truth.rng(8).standard_normal((2, 5))
    options = {"solver": backward, "rtol": 1e-12, "max_steps": 200}
    _, found = cell_vjp(be, made, g, forward__solver=forward, backward__options=options)
    close(found, truth.cell_gradients(made, g), 1e-8)


@pytest.mark.parametrize("solver", ["gmres", "broyden", "anderson", "picard"])
@pytest.mark.parametrize("start", ["auto", "zero", "cotangent", "reuse"])
def test_every_start_ends_at_the_same_u(be, truth, solver, start):
    problem = truth.affine(3, 3, 6, [0.3, 0.6, 0.8])
    g = truth.rng(4).standard_normal((3, 6))
    options = {"solver": solver, "start": start, "rtol": 1e-11, "max_steps": 300}
    u = affine_u(be, problem, g, forward__rtol=1e-6, backward__options=options)
    assert u == pytest.approx(exact(problem, g), rel=1e-8, abs=1e-9)


def test_starts_are_what_they_say(be, truth):
    """With no steps, u is the start."""
    problem = truth.affine(3, 2, 6, 0.6)
    g = truth.rng(4).standard_normal((2, 6))
    forward = iterate(
        be, Broyden(), truth.affine_map(be, problem), be.asarray(0 * problem.b), StoppingCriteria(0.0, max_steps=6)
    )
    estimate = Broyden().inverse_jacobian(be, forward.carry.state)
    inverses = [
        truth.broyden(lambda z, i=i: problem.a[i] @ z + problem.b[i], 0 * problem.b[i], 6)[1][-1] for i in range(2)
    ]
    reused = np.stack([-inverses[i].T @ g[i] for i in range(2)])
    for solver in ("gmres", "picard"):
        for start, expected in (("zero", 0 * g), ("cotangent", g), ("reuse", reused)):
            u, report, _ = solve_adjoint(be, "exact-ift", problem, g, estimate, solver=solver, start=start, max_steps=0)
            assert u == pytest.approx(expected, rel=1e-7, abs=1e-9), (solver, start)
            assert report.residual == pytest.approx(adjoint_residual(problem, g, u), rel=1e-9)
            assert report.status.tolist() == [Status.MAX_STEPS] * 2


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_truncation_is_reported_as_it_is(be, truth, steps):
    problem = truth.affine(6, 3, 10, 0.9)
    g = truth.rng(7).standard_normal((3, 10))
    u, report, pulled = solve_adjoint(be, "exact-ift", problem, g, rtol=1e-9, max_steps=steps)
    assert report.residual == pytest.approx(adjoint_residual(problem, g, u), rel=1e-8)
    for i in range(3):  # and it is the best that so many vjps can give
        best = truth.krylov_residuals(np.eye(10) - problem.a[i].T, g[i], steps)[-1] / np.linalg.norm(g[i])
        assert report.residual[i] == pytest.approx(best, rel=1e-8)
    assert report.status.tolist() == [Status.MAX_STEPS] * 3
    assert report.vjps.tolist() == [steps] * 3
    assert pulled == steps
    assert not report.fallback.any()
    assert np.isnan(report.error).all()


@pytest.mark.parametrize("solver", ["gmres", "picard", "anderson", "broyden"])
def test_reports_of_converged_solves_are_true(be, truth, solver):
    problem = truth.affine(8, 3, 8, [0.2, 0.5, 0.7])
    g = truth.rng(9).standard_normal((3, 8))
    u, report, pulled = solve_adjoint(be, "exact-ift", problem, g, solver=solver, rtol=1e-7, max_steps=200)
    assert report.status.tolist() == [Status.CONVERGED] * 3
    assert (report.residual <= 1e-7).all()
    assert report.residual == pytest.approx(adjoint_residual(problem, g, u), rel=1e-4, abs=1e-12)
    assert report.vjps.max() == pulled
    assert len(set(report.vjps.tolist())) > 1  # per sample


@pytest.mark.parametrize(("solver", "expected"), [("picard", Status.DIVERGED), ("gmres", Status.CONVERGED)])
def test_an_adjoint_that_plain_iteration_cannot_solve_says_so(be, truth, solver, expected):
    problem = truth.affine(8, 2, 6, [3.0, 0.3])
    g = truth.rng(9).standard_normal((2, 6))
    u, report, _ = solve_adjoint(be, "exact-ift", problem, g, solver=solver, rtol=1e-8, max_steps=100)
    assert [Status(int(s)) for s in report.status] == [expected, Status.CONVERGED]
    assert report.residual == pytest.approx(adjoint_residual(problem, g, u), rel=1e-3, abs=1e-12)


def test_a_singular_adjoint_is_reported_and_stays_finite(be, truth):
    problem = truth.affine(1, 3, 4, 0.5)
    problem.a[1] = np.diag([1.0, 0.5, 0.2, 0.1])
    g = np.ones((3, 4))
    u, report, _ = solve_adjoint(be, "exact-ift", problem, g, rtol=1e-8)
    assert [Status(int(s)) for s in report.status] == [Status.CONVERGED, Status.STALLED, Status.CONVERGED]
    assert np.isfinite(u).all()
    assert report.residual[1] >= 0.5 * (1 - 1e-12)  # 1 of 4 equations cannot hold
    assert u[[0, 2]] == pytest.approx(exact(truth.affine(1, 3, 4, 0.5), g)[[0, 2]], rel=1e-6)


@pytest.mark.parametrize("name", ["exact-ift", "jacobian-free", "neumann"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_bad_cotangents_stay_in_their_sample(be, truth, name, bad):
    problem = truth.affine(2, 3, 6, 0.6)
    g = truth.rng(3).standard_normal((3, 6))
    healthy, _, _ = solve_adjoint(be, name, problem, g)
    g[1] = bad
    u, report, _ = solve_adjoint(be, name, problem, g)
    assert np.array_equal(u[[0, 2]], healthy[[0, 2]])
    if bad == 0.0:
        assert not u[1].any()
        assert report.status[1] == Status.CONVERGED
        if name == "exact-ift":
            assert report.vjps[1] == 0
            assert report.residual[1] == 0.0
    else:
        assert not np.isfinite(u[1]).all()
        if name == "exact-ift":
            assert report.status[1] == Status.NONFINITE


@given(seed=st.integers(0, 1000))
def test_the_adjoint_of_a_sample_does_not_depend_on_its_batch(be, truth, seed):
    problem = truth.affine(seed, 3, 8, [0.2, 0.9, 0.6])
    g = truth.rng(seed).standard_normal((3, 8))
    u, report, _ = solve_adjoint(be, "exact-ift", problem, g, rtol=1e-6)
    for i in range(3):
        one = type(problem)(a=problem.a[i : i + 1], b=problem.b[i : i + 1], batch=1, n=8)
        alone, single, _ = solve_adjoint(be, "exact-ift", one, g[i : i + 1], rtol=1e-6)
        assert np.abs(alone[0] - u[i]).max() <= 1e-12 * np.abs(u[i]).max()
        assert single.vjps[0] == report.vjps[i]


def test_its_tolerance_is_its_own(be, truth):
    """A loose forward tolerance does not loosen the adjoint: on an affine map u does not depend on z*."""
    problem = truth.affine(3, 2, 6, 0.7)
    g = truth.rng(4).standard_normal((2, 6))
    u = affine_u(be, problem, g, forward__rtol=0.3, backward__options={"rtol": 1e-12})
    assert u == pytest.approx(exact(problem, g), rel=1e-9)


# -- broyden-reuse, plain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3, 10])
@given(seed=st.integers(0, 1000))
def test_plain_reuse_is_minus_ht_g(be, truth, steps, seed):
    problem = truth.affine(seed, 2, 12, 0.8)
    g = truth.rng(seed + 1).standard_normal((2, 12))
    u = affine_u(
        be,
        problem,
        g,
        forward__rtol=0.0,
        forward__max_steps=steps,
        backward__strategy="broyden-reuse",
        backward__options=PLAIN,
    )
    for i in range(2):
        f = lambda z, i=i: problem.a[i] @ z + problem.b[i]
        h = truth.broyden(f, np.zeros(12), steps)[1][-1]
        shaken = truth.broyden(f, np.full(12, 1e-15), steps)[1][-1]
        noise = 1e3 * np.abs((h - shaken).T @ g[i]).max()
        assert np.abs(u[i] + h.T @ g[i]).max() <= max(1e-9, noise) * max(1.0, np.abs(u[i]).max())
        if steps == 10:  # the test can tell: neither the other sign nor H instead of Hᵀ
            assert np.abs(u[i] - h.T @ g[i]).max() > 1e-2
            assert np.abs(u[i] + h @ g[i]).max() > 1e-2


def test_plain_reuse_of_anderson_is_its_multisecant_estimate(be, truth):
    problem = truth.affine(5, 1, 12, 0.7)
    g = truth.rng(6).standard_normal((1, 12))
    u = affine_u(
        be,
        problem,
        g,
        forward__solver="anderson",
        forward__rtol=0.0,
        forward__max_steps=5,
        forward__options={"history_size": 5, "ridge": 0.0, "max_residual_growth": 1e12},
        backward__strategy="broyden-reuse",
        backward__options=PLAIN,
    )
    a, b = problem.a[0], problem.b[0]
    z = np.array(truth.anderson(lambda z: a @ z + b, np.zeros(12), 5, 5))
    fz = z @ a.T + b
    df, dg = np.diff(fz, axis=0).T, np.diff(fz - z, axis=0).T
    h = -np.eye(12) + df @ scipy.linalg.pinv(dg)
    assert u[0] == pytest.approx(-h.T @ g[0], rel=1e-6, abs=1e-6)


def test_plain_reuse_is_exact_where_the_secants_span_everything(be, truth):
    """In n = 4 dimensions Broyden has seen every direction after 2n steps at most."""
    problem = truth.affine(2, 2, 4, 0.8)
    g = truth.rng(3).standard_normal((2, 4))
    u = affine_u(be, problem, g, forward__rtol=1e-9, backward__strategy="broyden-reuse", backward__options=PLAIN)
    error = np.linalg.norm(u - exact(problem, g), axis=1) / np.linalg.norm(u, axis=1)
    assert error.max() < 0.5


def test_reuse_in_a_batch_is_reuse_alone(be, truth):
    """Samples that converge at different steps keep the estimates that they would have alone."""
    problem = truth.affine(9, 3, 10, [0.1, 0.4, 0.7])
    g = truth.rng(1).standard_normal((3, 10))
    settings = {
        "forward__rtol": 1e-3,
        "backward__strategy": "broyden-reuse",
        "backward__options": PLAIN,
    }
    together = affine_u(be, problem, g, **settings)
    for i in range(3):
        one = type(problem)(a=problem.a[i : i + 1], b=problem.b[i : i + 1], batch=1, n=10)
        alone = affine_u(be, one, g[i : i + 1], **settings)
        assert np.abs(alone[0] - together[i]).max() <= 1e-12 * np.abs(alone).max()


# -- broyden-reuse, certified -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_relative_error": 0.01},
        {"max_relative_error": 0.01, "fallback": "none", "max_refine_vjps": 2},
        {"max_relative_error": 0.01, "fallback": "exact-ift", "max_refine_vjps": 2},
        {"max_relative_error": 1e-6, "fallback": "jacobian-free", "max_refine_vjps": 1},
        {"max_relative_error": None, "fallback": "none"},
    ],
    ids=repr,
)
def test_the_certificate_is_the_residual_that_others_measure(be, truth, options):
    problem = truth.affine(12, 6, 16, [0.0, 0.3, 0.6, 0.8, 0.9, 0.97])
    g = truth.rng(13).standard_normal((6, 16))
    solver = Broyden()
    forward = iterate(be, solver, truth.affine_map(be, problem), be.asarray(0 * problem.b), StoppingCriteria(1e-3))
    strategy = plugins.make_strategy("broyden-reuse", options)
    a = be.asarray(problem.a)
    adjoint = Adjoint(be, strategy, solver)
    u, report = adjoint(lambda v: be.xp.sum(a * v[:, :, None], axis=1), be.asarray(g), forward.carry.state)
    u, report = be.to_numpy(u), type(report)(*(be.to_numpy(leaf) for leaf in report))
    true = adjoint_residual(problem, g, u)
    assert report.residual == pytest.approx(true, rel=1e-6, abs=1e-9)
    target = options.get("max_relative_error", 0.1)
    if target is not None:
        met = report.status == Status.CONVERGED
        assert (true[met & ~report.fallback] <= target * (1 + 1e-6)).all()
        missed = true > target * (1 + 1e-6)
        assert not (met & missed & ~report.fallback).any()
    assert np.isfinite(u).all()


# -- the others -------------------------------------------------------------------------------------------------


def test_jacobian_free_is_the_gradient_of_one_step(be, truth):
    made = truth.cell(3, 2, 5, 3)
    g = truth.rng(4).standard_normal((2, 5))
    _, found = cell_vjp(be, made, g, backward__strategy="jacobian-free")
    close(found, truth.cell_gradients(made, g, u=g), 1e-8)


@pytest.mark.parametrize("terms", [1, 4])
def test_neumann_is_its_partial_sum(be, truth, terms):
    problem = truth.affine(3, 2, 6, 0.7)
    g = truth.rng(4).standard_normal((2, 6))
    u, report, pulled = solve_adjoint(be, "neumann", problem, g, terms=terms)
    expected, power = g.copy(), g
    for _ in range(terms):
        power = np.einsum("bij,bi->bj", problem.a, power)
        expected = expected + power
    assert u == pytest.approx(expected, rel=1e-10)
    assert pulled == terms
    assert report.vjps.tolist() == [terms] * 2


def test_unrolled_is_the_gradient_of_the_steps(be, truth):
    """k plain steps from 0 give z_k = Σ_{j<k} A^j b, whose gradient for b is Σ_{j<k} (Aᵀ)^j g."""
    problem = truth.affine(3, 2, 6, 0.7)
    g = truth.rng(4).standard_normal((2, 6))
    u = affine_u(
        be, problem, g, forward__solver="picard", backward__strategy="unrolled", backward__options={"steps": 4}
    )
    powers = [g]
    for _ in range(5):
        powers.append(np.einsum("bij,bi->bj", problem.a, powers[-1]))
    fits = [np.allclose(u, sum(powers[:k]), rtol=1e-8) for k in (4, 5)]
    assert any(fits)  # f(z₄): the evaluation at the last iterate counts or not


# -- contracts --------------------------------------------------------------------------------------------------


def test_strategies_ask_only_for_what_they_use():
    made = plugins.make_strategy
    free, exact_ift, reuse = made("jacobian-free"), made("exact-ift"), made("broyden-reuse", PLAIN)
    assert (free.uses_vjp(), free.wants_estimate()) == (False, False)
    assert (exact_ift.uses_vjp(), exact_ift.wants_estimate()) == (True, False)
    assert (reuse.uses_vjp(), reuse.wants_estimate()) == (False, True)
    assert made("exact-ift", {"start": "reuse"}).wants_estimate()
    assert made("broyden-reuse").uses_vjp()
    assert [made("neumann", {"terms": terms}).uses_vjp() for terms in (0, 1, 5)] == [False, True, True]
    assert [made(name).exact for name in ("exact-ift", "broyden-reuse", "jacobian-free", "neumann")] == [True] + [
        False
    ] * 3


def test_a_file_without_null_can_ask_for_plain_reuse():
    assert plugins.make_strategy("broyden-reuse", PLAIN | {"max_relative_error": "none"}) == plugins.make_strategy(
        "broyden-reuse", PLAIN
    )


def test_reuse_without_an_estimate_is_a_broken_promise(be, truth):
    problem = truth.affine(3, 2, 6, 0.7)
    with pytest.raises(StrategyError, match="without the estimate"):
        solve_adjoint(be, "broyden-reuse", problem, problem.b)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "broyden-reuse",
            {"max_relative_error": 1.5},
            "number between 0 and 1, or none (got 1.5)",
        ),
        (
            "broyden-reuse",
            {"max_relative_error": "some"},
            "max_relative_error must be of type Union[float, Literal['none'], NoneType] (got 'some')",
        ),
        ("broyden-reuse", {"max_refine_vjps": 0}, "max_refine_vjps must be at least 1 (got 0)"),
        ("broyden-reuse", {"fallback": "hope"}, "'hope'"),
        ("exact-ift", {"rtol": "tight"}, "rtol must be of type Union[float, Literal['auto']] (got 'tight')"),
        ("jacobian-free", {"steps": 1}, "no option 'steps'"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ConfigError) as caught:
        plugins.make_strategy(name, options)
    assert message in str(caught.value)


def test_an_estimate_is_a_linear_operator(be, truth):
    """H (a v + b w) = a H v + b H w, and ⟨w, H v⟩ = ⟨Hᵀ w, v⟩, for what each solver leaves."""
    problem = truth.affine(3, 2, 8, 0.7)
    v, w = (be.asarray(truth.rng(i).standard_normal((2, 8))) for i in range(2))
    for name in ("broyden", "anderson"):
        solver = plugins.make_solver(name)
        forward = iterate(be, solver, truth.affine_map(be, problem), be.asarray(0 * problem.b), StoppingCriteria(1e-6))
        for h in (solver.inverse_jacobian(be, forward.carry.state), solver.secant_estimate(be, forward.carry.state)):
            assert isinstance(h, InverseJacobian)
            mixed = be.to_numpy(h.apply(2 * v - 3 * w))
            assert mixed == pytest.approx(be.to_numpy(2 * h.apply(v) - 3 * h.apply(w)), rel=1e-7, abs=1e-7)
            left, right = be.inner(w, h.apply(v)), be.inner(h.apply_transpose(w), v)
            assert be.to_numpy(left) == pytest.approx(be.to_numpy(right), rel=1e-7, abs=1e-7)
