"""When solves end: with known fixed points, without any, at the edge of f's domain. Truth: closed forms."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.solve.loop import iterate
from deqcore.solvers.anderson import Anderson
from deqcore.solvers.broyden import Broyden
from deqcore.solvers.newton_krylov import NewtonKrylov
from deqcore.solvers.picard import Picard
from deqcore.testing.problems import golden
from deqcore.testing.suite.fixtures import Kit
from deqcore.types import Status, StoppingCriteria

ACCELERATED = ["broyden", "anderson", "newton-krylov"]
SOLVERS = [*ACCELERATED, "picard"]


@pytest.fixture(autouse=True)
def _no_warnings_from_f():
    with np.errstate(all="ignore"):
        yield


def solve(be, f, z0, solver, dtype="float64", **settings):
    if solver == "newton-krylov" and not be.capabilities.jvp:
        pytest.skip("no products J v")
    settings = {"forward__on_failure": "ignore", **settings}
    z0 = be.asarray(np.asarray(z0, float), dtype=dtype)
    return deqcore.fixed_point(f, z0, forward__solver=solver, **settings)


def statuses(be, sol):
    return [Status(int(code)) for code in be.to_numpy(sol.status)]


def prenorm(xp):
    """A pre-norm residual cell, z + W tanh(norm(z)) + b, whose residual has no zero: |W tanh| < |b|."""

    def f(z):
        unit = z / xp.sqrt(xp.sum(z * z, axis=1) + 1e-6)[:, None]
        return z + 0.3 * xp.tanh(xp.roll(unit, 1, axis=1)) + 0.5

    return f


ROOTLESS = {
    "the example": lambda xp: lambda z: z + 1.0 + 0.5 * xp.tanh(z),
    "translation": lambda xp: lambda z: z + 1.0,
    "reciprocal": lambda xp: lambda z: z + 1.0 / z,
    "cell": prenorm,
    "residual growth": lambda xp: lambda z: z + 1.0 + 0.01 * xp.abs(z),
    "slow growth": lambda xp: lambda z: z + xp.sqrt(xp.abs(z) + 1.0),
    "wave": lambda xp: lambda z: z + 2.0 + xp.sin(z),
}
ALSO_ENDS = ["the example", "cell"]  # as DIVERGED or STALLED in the default budget, with every solver


@pytest.mark.filterwarnings("ignore::deqcore.errors.DerivativeWarning")  # |z| has a kink at the start
@pytest.mark.parametrize("name", ROOTLESS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_growth_of_the_iterate_meets_no_tolerance(be, name, solver, dtype):
    f = ROOTLESS[name](be.xp)
    z0 = np.ones((2, 3)) if name == "reciprocal" else np.array([[0.0] * 3, [0.5] * 3])
    for settings in ({}, {"forward__max_steps": 200}, {"forward__rtol": 0.0, "forward__atol": 1e-6}):
        if name == "reciprocal" and settings.get("forward__atol"):
            continue  # its residual does fall below any number
        sol = solve(be, f, z0, solver, dtype, **settings)
        found = statuses(be, sol)
        if name == "reciprocal" and Status.CONVERGED in found:
            # A solver that jumps may reach a z at which the residual 1/z has fallen as far as z has grown: it then does
            # not meet the tolerance by growth. Which jumps are taken depends on the rounding of the CPU.
            first = np.linalg.norm(np.ones(3)) * np.linalg.norm(np.full(3, 2.0))
            assert (be.to_numpy(sol.residual) * np.linalg.norm(be.to_numpy(sol.fz), axis=1) <= first).all()
            continue
        assert Status.CONVERGED not in found, settings
        if name in ALSO_ENDS and not settings.get("forward__atol"):
            assert set(found) <= {Status.DIVERGED, Status.STALLED}, settings


@pytest.mark.parametrize("solver", ["broyden", "anderson"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_growth_is_measured_in_units_of_the_problem(be, solver, scale):
    f = ROOTLESS["the example"](be.xp)
    plain = solve(be, f, np.zeros((2, 3)), solver)
    scaled = solve(be, lambda z: scale * f(z / scale), np.zeros((2, 3)), solver)
    assert Status.CONVERGED not in statuses(be, scaled)
    assert set(statuses(be, scaled)) <= {Status.DIVERGED, Status.STALLED}
    assert set(statuses(be, plain)) <= {Status.DIVERGED, Status.STALLED}


def test_continuing_a_runaway_solve_does_not_make_it_converge(be):
    f = ROOTLESS["the example"](be.xp)
    for solver in ("broyden", "anderson", "picard"):
        sol = solve(be, f, np.zeros((2, 3)), solver, forward__max_steps=3)
        for _ in range(6):
            z0 = be.asarray(np.zeros((2, 3)))
            sol = deqcore.fixed_point(
                f, z0, state=sol.state, forward__solver=solver, forward__max_steps=20, forward__on_failure="ignore"
            )
        assert Status.CONVERGED not in statuses(be, sol)


# Each with z*, as functions of one number per component; starts are multiples of its scale.
ROOTED = {
    "affine": (lambda xp: lambda z: 0.5 * z + 1.0, 2.0),
    "steep": (lambda xp: lambda z: 4.0 - 3.0 * z, 1.0),
    "slow": (lambda xp: lambda z: 0.99 * z + 1.0, 100.0),
    "very slow": (lambda xp: lambda z: 0.999 * z + 1.0, 1000.0),
    "cosine": (lambda xp: xp.cos, 0.7390851332151607),
    "saturated": (lambda xp: lambda z: 1e-3 + 1e3 * xp.tanh(z), 1000.001),
    "zero": (lambda xp: lambda z: 0.5 * xp.tanh(z), 0.0),
}


@pytest.mark.parametrize("name", ROOTED)
@pytest.mark.parametrize("solver", ["broyden", "anderson"])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("start", [0.0, 1.0, 1000.0, "at the root"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fixed_points_are_found_from_near_and_far(be, name, solver, scale, start, dtype):
    if (name, start) in [("steep", 1000.0), ("cosine", 1000.0), ("saturated", 0.0), ("zero", 1000.0)]:
        pytest.skip("another solution, or another basin, is nearer")
    made, root = ROOTED[name]
    f = made(be.xp)
    z0 = np.full((2, 3), scale * (root if start == "at the root" else start))
    sol = solve(be, lambda z: scale * f(z / scale), z0, solver, dtype, forward__max_steps=60)
    assert statuses(be, sol) == [Status.CONVERGED] * 2
    value = be.to_numpy(sol.value) / scale
    factor = 2000.0 if "slow" in name else 10.0
    np.testing.assert_allclose(value, root, rtol=factor * (1e-4 if dtype == "float32" else 1.5e-8), atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_an_equilibrium_at_zero_converges(be, solver, scale):
    f = lambda z: 0.5 * scale * be.xp.tanh(z / scale)
    sol = solve(be, f, np.full((1, 3), scale), solver, forward__max_steps=300)
    assert statuses(be, sol) == [Status.CONVERGED]
    assert np.abs(be.to_numpy(sol.value)).max() <= 1e-30 * scale


def test_a_row_of_dead_units_converges_beside_others(be):
    w = np.array([[0.4, -0.2], [0.1, 0.3]])
    b = np.array([[-5.0, -5.0], [1.0, 2.0]])
    w_, b_ = be.asarray(w), be.asarray(b)
    f = lambda z: be.xp.maximum(be.xp.matmul(z, w_.T) + b_, 0.0 * b_)
    for solver in ("broyden", "anderson", "picard"):
        sol = solve(be, f, np.ones((2, 2)), solver, forward__max_steps=100)
        assert statuses(be, sol) == [Status.CONVERGED] * 2
        expected = np.array([[0.0, 0.0], np.linalg.solve(np.eye(2) - w, b[1])])
        np.testing.assert_allclose(be.to_numpy(sol.value), expected, atol=1e-7)


def test_blow_up_is_measured_by_the_scale_of_the_start(be):
    """A linear problem of NIST's kind: the first residual is small where the start solves the large component."""
    u, k = np.array([[4e-10, 0.907]]), np.array([[-5e4, -0.05]])
    u_, k_ = be.asarray(u), be.asarray(k)
    for z0 in (np.zeros((1, 2)), u, np.ones((1, 2)), u / (1 - k) + np.array([[0.0, 1e-6]])):
        sol = solve(be, lambda v: u_ + k_ * v, z0, "broyden")
        assert statuses(be, sol) == [Status.CONVERGED]
        np.testing.assert_allclose(be.to_numpy(sol.value)[0], (u / (1 - k))[0], atol=1e-7)


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_newton_krylov_keeps_what_it_finds_at_condition_1e4_in_float32(backend):
    """‖z*‖ is 2000 times the first residual. In JAX no residual after the hundredfold fall is eight times the next."""
    pytest.importorskip(backend)
    be = deqcore.get_backend(backend=backend)
    kit, problem = Kit(be), golden("ill-conditioned")
    f, z0, args = kit.data(problem, "float32")
    sol = kit.solve(f, z0, *args, solver="newton-krylov", rtol=1e-4, max_steps=300)
    assert statuses(be, sol) == [Status.CONVERGED] * 3
    assert kit.numpy(sol.evaluations).max() < 100
    found, truth = (np.asarray(z).reshape(3, -1) for z in (kit.numpy(sol.value), problem.truth.z))
    # rtol times the condition allows an error of 1. How much is left depends on the rounding of products by the CPU
    # (0.4 % on one, 4 % on another).
    assert (np.linalg.norm(found - truth, axis=1) <= 0.1 * np.linalg.norm(truth, axis=1)).all()


# -- steps to where f is not finite -----------------------------------------------------------------------------

WALLED = {
    "power": (lambda xp: lambda z: z**1.5 / 3.0, 1.0, 0.0),
    "root": (lambda xp: lambda z: z - 3.0 * (xp.sqrt(z) - 0.5), 4.0, 0.25),
    "logarithm": (lambda xp: lambda z: z - 2.0 * xp.log(z) - 1.0, 6.0, np.exp(-0.5)),
}


@pytest.mark.filterwarnings("ignore::deqcore.errors.DerivativeWarning")  # f is not finite at a refused point
@pytest.mark.parametrize("name", ["root", "logarithm", "power"])
@pytest.mark.parametrize("solver", ACCELERATED)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_step_out_of_the_domain_is_tried_shorter(be, name, solver, dtype):
    made, start, root = WALLED[name]
    if name == "power" and solver == "newton-krylov":
        pytest.skip("halving toward 0 is linear: it ends as MAX_STEPS in 40 steps")
    if dtype == "float32" and solver == "newton-krylov" and be.name == "numpy":
        pytest.skip("products by differences in float32 are too coarse")
    sol = solve(be, made(be.xp), np.full((2, 3), start), solver, dtype)
    assert statuses(be, sol) == [Status.CONVERGED] * 2
    np.testing.assert_allclose(be.to_numpy(sol.value), root, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize("solver", [Broyden(), Broyden(history_size=4), Anderson(), Picard(), NewtonKrylov()], ids=repr)
def test_a_refused_step_changes_no_bit_of_its_neighbours(be, solver):
    if isinstance(solver, NewtonKrylov) and not be.capabilities.jvp:
        pytest.skip("no products J v")
    wall = be.asarray(np.array([[True], [False], [False]]))
    b = be.asarray(np.random.default_rng(0).standard_normal((3, 5)))

    def run(walled):
        def f(z):
            cell = 0.7 * be.xp.tanh(be.xp.roll(z, 1, axis=1)) + b
            return be.xp.where(wall, z - 3.0 * (be.xp.sqrt(z) - 0.5), cell) if walled else cell

        return iterate(be, solver, f, be.asarray(np.full((3, 5), 4.0)), StoppingCriteria(1e-10, max_steps=60))

    refused, plain = run(True), run(False)
    for name in ("z", "fz", "residual", "status", "steps"):
        one, two = (be.to_numpy(getattr(found, name))[1:] for found in (refused, plain))
        assert np.array_equal(one, two), name
    alone = iterate(
        be,
        solver,
        lambda z: z - 3.0 * (be.xp.sqrt(z) - 0.5),
        be.asarray(np.full((1, 5), 4.0)),
        StoppingCriteria(1e-10, max_steps=60),
    )
    assert abs(int(alone.steps[0]) - int(refused.steps[0])) <= 1


@pytest.mark.parametrize("solver", [Broyden(), Anderson(), Picard()], ids=repr)
def test_finite_steps_cost_nothing(be, solver):
    calls = []

    def f(z):
        calls.append(1)
        return 0.5 * z + 1.0

    found = iterate(be, solver, f, be.asarray(np.zeros((2, 3))), StoppingCriteria(1e-9))
    assert len(calls) == int(found.evaluations.max()) == 1 + int(found.steps.max())


def test_a_refused_step_cut_off_by_the_budget_is_taken_up_again(be):
    f = lambda z: z - 3.0 * (be.xp.sqrt(z) - 0.5)
    z0 = be.asarray(np.full((1, 2), 4.0))
    first = iterate(be, Broyden(), f, z0, StoppingCriteria(1e-9, max_steps=1))
    assert Status(int(first.status[0])) is Status.NONFINITE
    rest = iterate(be, Broyden(), f, z0, StoppingCriteria(1e-9, max_steps=40), first.carry)
    assert Status(int(rest.status[0])) is Status.CONVERGED
    np.testing.assert_allclose(be.to_numpy(rest.fz), 0.25, atol=1e-8)


def test_a_secant_estimate_ignores_the_point_after_a_refused_step(be):
    f = lambda z: z - 3.0 * (be.xp.sqrt(z) - 0.5)
    for solver in (Broyden(), Anderson()):
        found = iterate(be, solver, f, be.asarray(np.full((1, 1), 4.0)), StoppingCriteria(1e-10, max_steps=60))
        h = solver.secant_estimate(be, found.carry.state)
        v = be.asarray(np.ones((1, 1)))
        expected = 1.0 / (-3.0 * 0.5 / np.sqrt(0.25))  # (df/dz − 1)⁻¹
        np.testing.assert_allclose(be.to_numpy(h.apply(v)), [[expected]], rtol=0.1)  # the mean of all pairs


def test_patience_is_a_setting(be):
    """A rotation by 90° keeps its residual: plain iteration stalls after `patience` steps."""
    turn = lambda z: be.xp.concat([-z[:, 1:], z[:, :1]], axis=1)
    for patience in (7, 23):
        sol = solve(be, turn, np.ones((1, 2)), "picard", forward__patience=patience, forward__max_steps=100)
        assert statuses(be, sol) == [Status.STALLED]
        assert int(sol.steps[0]) == patience
    with pytest.raises(deqcore.errors.ConfigError, match="patience"):
        solve(be, turn, np.ones((1, 2)), "picard", forward__patience=0)


# -- traced code ------------------------------------------------------------------------------------------------


def test_compiled_statuses_are_those_of_eager_code():
    jax = pytest.importorskip("jax")
    jnp = jax.numpy

    def run(solver, xp, made, z0):
        return deqcore.fixed_point(made(xp), z0, forward__solver=solver, forward__on_failure="ignore").status

    turn = lambda z: jnp.concatenate([-z[:, 1:], z[:, :1]], axis=1)
    settings = {"forward__solver": "picard", "forward__max_steps": 100, "forward__on_failure": "ignore"}
    found = deqcore.fixed_point(turn, jnp.ones((1, 2)), forward__patience=7, **settings)
    assert (int(found.status[0]), int(found.steps[0])) == (int(Status.STALLED), 7)
    z0 = np.zeros((2, 3), np.float32)
    for solver in ("broyden", "anderson"):
        for call in (run, lambda *a: jax.jit(lambda z: run(*a[:3], z))(a[3])):
            found = call(solver, jnp, ROOTLESS["the example"], jnp.asarray(z0))
            assert set(np.asarray(found).tolist()) <= {int(Status.DIVERGED), int(Status.STALLED)}
        made, start, _ = WALLED["root"]
        found = run(solver, jnp, made, jnp.full((2, 3), start, jnp.float32))
        assert np.asarray(found).tolist() == [1, 1]
