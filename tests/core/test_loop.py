"""The loop's promises, each as a test that fails without it. Solvers run on matrices `(batch, n)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deqcore.abc.solver import Solver
from deqcore.solve.loop import iterate
from deqcore.solvers.anderson import Anderson
from deqcore.solvers.broyden import Broyden
from deqcore.solvers.picard import Picard
from deqcore.types import Status, StoppingCriteria

SOLVERS = [Picard(), Anderson(history_size=4), Broyden(history_size=12)]
WITH_ESTIMATE = [Anderson(history_size=4), Broyden(history_size=12)]
FIELDS = ("z", "fz", "residual", "status", "steps", "evaluations")


@pytest.fixture(autouse=True)
def _no_warnings_from_f():
    """As `Autodiff.forward_only` does for NumPy: NaN and inf are statuses here."""
    with np.errstate(all="ignore"):
        yield


def host(be, forward):
    return {name: np.array(be.to_numpy(getattr(forward, name))) for name in FIELDS}


def estimate(be, solver, forward, seed=0):
    """The estimate a solve left behind, seen through its products with one vector: H v and Hᵀ v."""
    shape = tuple(forward.z.shape)
    v = np.random.default_rng(seed).standard_normal((1, shape[1])).repeat(shape[0], 0)
    v = be.asarray(v, dtype=be.dtype_name(forward.z))
    h = solver.inverse_jacobian(be, forward.carry.state)
    return np.stack([be.to_numpy(h.apply(v)), be.to_numpy(h.apply_transpose(v))], axis=1)


def identical(a, b):
    return np.array_equal(a, b, equal_nan=True)


def codes(forward, be):
    return [Status(int(s)) for s in be.to_numpy(forward.status)]


class CountState(NamedTuple):
    count: Any  # (batch,)
    trail: Any  # History


@dataclass(frozen=True)
class Counting(Solver):
    """Plain iteration that counts its steps in a leaf and keeps every residual in a history."""

    def init(self, backend, z, fz):
        return CountState(backend.norm(z) * 0, backend.history(z, 50).append(fz - z))

    def step(self, backend, f, z, fz, state):
        z, fz = fz, f(fz)
        return z, fz, CountState(state.count + 1, state.trail.append(fz - z))


@dataclass(frozen=True)
class Scripted(Solver):
    """Visits given iterates, whatever f says: `table[k]` is the iterate after k steps."""

    table: tuple[tuple[float, ...], ...] = ()
    visits: ClassVar[list[int]] = []

    def init(self, backend, z, fz):
        self.visits.clear()
        return ()

    def restarted(self, backend, rows, z, state):
        return state

    def step(self, backend, f, z, fz, state):
        self.visits.append(1)
        row = self.table[min(len(self.visits), len(self.table) - 1)]  # `visits` counts steps, refused ones too
        z = backend.asarray(np.array(row)[:, None] * np.ones((1, z.shape[1])), like=z)
        return z, f(z), state


# -- freezing and independence -------------------------------------------------------------------------------


def test_a_sample_stops_at_the_first_iterate_that_meets_the_tolerance(be, truth):
    rates, b = np.array([0.0, 0.3, 0.9, -0.97])[:, None], truth.rng(0).standard_normal((4, 5))
    r, c = be.asarray(rates), be.asarray(b)
    result = host(be, iterate(be, Picard(), lambda z: r * z + c, 0 * c, StoppingCriteria(1e-3, max_steps=500)))
    for i in range(4):
        trace = truth.picard(lambda z, i=i: rates[i] * z + b[i], np.zeros(5), 1e-3, max_steps=500)
        z, fz, residual = trace[-1]
        assert result["steps"][i] == len(trace) - 1
        assert identical(result["z"][i], z)
        assert identical(result["fz"][i], fz)
        assert result["residual"][i] == pytest.approx(residual, rel=1e-12)
        assert result["status"][i] == Status.CONVERGED
    assert len(set(result["steps"])) == 4  # the samples did stop at different times


def test_state_and_history_stop_with_their_sample(be, truth):
    rates, b = np.array([0.1, 0.5, 0.8])[:, None], truth.rng(1).standard_normal((3, 4))
    r, c = be.asarray(rates), be.asarray(b)
    forward = iterate(be, Counting(), lambda z: r * z + c, 0 * c, StoppingCriteria(1e-4, max_steps=49))
    steps = be.to_numpy(forward.steps)
    state = forward.carry.state
    assert identical(be.to_numpy(state.count), steps.astype(float))
    assert identical(be.to_numpy(state.trail.count()), steps + 1)
    kept = be.to_numpy(state.trail.vectors())
    for i in range(3):
        trace = truth.picard(lambda z, i=i: rates[i] * z + b[i], np.zeros(4), 1e-4)
        assert identical(kept[i, : len(trace)], np.array([fz - z for z, fz, _ in trace]))
        assert not kept[i, len(trace) :].any()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@given(seed=st.integers(0, 100), narrow=st.booleans())
def test_a_batch_and_its_samples_alone_agree(be, truth, solver, seed, narrow):
    dtype, tolerance = ("float32", 1e-6) if narrow else ("float64", 1e-12)
    problem = truth.affine(seed, 4, 8, [0.1, 0.4, 0.7, 0.2])
    # A few steps: how fast rounding grows with the steps of an accelerated method is the method's business.
    control = StoppingCriteria(1e-3, max_steps=6)

    def solve(rows):
        f = truth.affine_map(be, problem, rows, dtype)
        z0 = be.asarray(0 * problem.b[rows], dtype=dtype)
        forward = iterate(be, solver, f, z0, control)
        result = host(be, forward)
        if solver.has_estimate:
            result["estimate"] = estimate(be, solver, forward)
        return result

    together = solve(slice(None))
    for i in range(4):
        alone = solve(slice(i, i + 1))
        assert alone["steps"] == together["steps"][i]
        assert alone["status"] == together["status"][i]
        for name in ("z", "fz", *(["estimate"] if solver.has_estimate else [])):
            error = np.abs(alone[name][0] - together[name][i]).max()
            assert error <= tolerance * np.abs(together[name][i]).max(), name


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("harm", ["nan", "inf", "divergent"])
def test_a_bad_sample_changes_no_bit_of_its_neighbours(be, truth, solver, harm):
    problem = truth.affine(3, 5, 8, [0.5, 0.8, 0.6, 0.9, 0.7])

    def solve(bad):
        calls = 0
        plain = truth.affine_map(be, problem)
        row = np.zeros((5, 1), bool)
        row[2] = bad
        row = be.asarray(row)

        def f(z):
            nonlocal calls
            calls += 1
            fz = plain(z)
            if harm == "divergent":
                return be.xp.where(row, 1e3 * z * z + 1e3, fz)
            poison = be.xp.full_like(fz, float(harm))
            return be.xp.where(row, poison, fz) if calls > 3 else fz

        forward = iterate(be, solver, f, be.asarray(0 * problem.b), StoppingCriteria(1e-10, max_steps=30))
        return forward, host(be, forward), estimate(be, solver, forward) if solver.has_estimate else None

    _, healthy, healthy_estimate = solve(False)
    forward, result, found_estimate = solve(True)
    assert codes(forward, be)[2] in (Status.NONFINITE, Status.DIVERGED, Status.MAX_STEPS, Status.STALLED)
    assert np.isfinite(result["z"][2]).all()
    assert np.isfinite(result["fz"][2]).all()
    for i in (0, 1, 3, 4):
        for name in FIELDS:
            assert identical(result[name][i], healthy[name][i]), (name, i)
        if found_estimate is not None:
            assert identical(found_estimate[i], healthy_estimate[i]), i


@pytest.mark.parametrize("waits", [False, True], ids=["host", "device"])
def test_the_figures_of_a_sample_stop_with_it_and_a_second_solve_is_that_alone(be, monkeypatch, waits):
    """One converges, one is slow, one stalls, one diverges where the step after is not finite, one is not finite."""
    if waits:
        monkeypatch.setattr(type(be.host), "numpy_view", lambda self, x: None)
    rates = np.array([0.1, 0.97, -1.0, 3.0, 2.0])
    limits = np.array([np.inf, np.inf, np.inf, 2e6, 20.0])
    figures = ("status", "steps", "best_residual", "reference", "peak", "mark", "since", "length", "tried")

    def solve(rows, resume=None):
        a, top = be.asarray(rates[rows][:, None]), be.asarray(limits[rows][:, None])
        f = lambda z: be.xp.where(be.xp.abs(z) > top, be.xp.full_like(z, float("nan")), a * z + 1.0)
        control = StoppingCriteria(1e-3, max_steps=400, patience=30)
        forward = iterate(be, Picard(), f, 0 * a, control, None if resume is None else resume.carry)
        return forward, {name: np.array(be.to_numpy(getattr(forward.carry, name))) for name in figures}

    first, together = solve(slice(None))
    _, again = solve(slice(None), first)
    ends = [Status.CONVERGED, Status.CONVERGED, Status.STALLED, Status.DIVERGED, Status.NONFINITE]
    assert codes(first, be) == ends
    assert together["steps"].argmax() == 1
    for i in range(len(rates)):
        alone, own = solve(slice(i, i + 1))
        _, own_again = solve(slice(i, i + 1), alone)
        for name in figures:
            assert identical(together[name][i], own[name][0]), (i, name)
            assert identical(again[name][i], own_again[name][0]), (i, name)


# -- best iterate --------------------------------------------------------------------------------------------


def test_the_best_iterate_is_kept_per_sample(be):
    nan, inf = float("nan"), float("inf")
    table = (
        (4.0, 4.0, 4.0, 4.0),
        (2.0, 5.0, nan, 3.0),
        (1.0, 6.0, 1.0, 2.0),
        (3.0, 7.0, 1.0, inf),
        (9.0, 1.0, 1.0, 1.0),
    )
    z0 = be.asarray(4.0 * np.ones((4, 3)))
    forward = iterate(be, Scripted(table), lambda z: 0 * z, z0, StoppingCriteria(1e-9, max_steps=4))
    result = host(be, forward)
    # f(z) = 0, so the residual is √3·|z|: best of each column, up to where it stopped being finite.
    # A step to where f is not finite is refused, and the next one decides.
    assert result["z"][:, 0].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert result["residual"] == pytest.approx(np.sqrt(3.0) * np.ones(4))
    assert identical(result["fz"], np.zeros((4, 3)))
    assert codes(forward, be) == [Status.MAX_STEPS] * 4
    assert result["steps"].tolist() == [4, 4, 4, 4]


def test_a_step_that_stays_refused_ends_with_the_best_finite_iterate(be):
    nan, inf = float("nan"), float("inf")
    table = ((4.0, 4.0, 4.0), (2.0, nan, 3.0), (1.0, nan, 2.0), *[(1.0, nan, inf)] * 9)
    z0 = be.asarray(4.0 * np.ones((3, 3)))
    forward = iterate(be, Scripted(table), lambda z: 0 * z, z0, StoppingCriteria(1e-9, max_steps=12))
    result = host(be, forward)
    assert result["z"][:, 0].tolist() == [1.0, 4.0, 2.0]
    assert result["residual"] == pytest.approx(np.sqrt(3.0) * np.array([1.0, 4.0, 2.0]))
    assert codes(forward, be)[1:] == [Status.NONFINITE, Status.NONFINITE]
    assert result["steps"].tolist() == [12, 6, 8]  # the first refused step, and five that are shorter and shorter


def test_the_last_finite_iterate_of_a_failed_sample_is_the_best_not_the_last(be, truth):
    problem = truth.affine(5, 2, 6, 0.9)
    calls = 0
    plain = truth.affine_map(be, problem)

    def f(z):
        nonlocal calls
        calls += 1
        return plain(z) * float("nan") if calls >= 8 else plain(z)

    result = host(be, iterate(be, Picard(), f, be.asarray(0 * problem.b), StoppingCriteria(1e-9)))
    for i in range(2):
        trace = truth.picard(lambda z, i=i: problem.a[i] @ z + problem.b[i], np.zeros(6), 0.0, max_steps=6)
        best = min(trace, key=lambda t: t[2])
        assert result["z"][i] == pytest.approx(best[0], rel=1e-12)
        assert result["residual"][i] == pytest.approx(best[2], rel=1e-12)
    assert set(result["status"]) == {Status.NONFINITE}


# -- statuses ------------------------------------------------------------------------------------------------


def test_every_status_occurs_in_one_batch(be):
    # converged | too slow | turns in a circle | expands | NaN at once | NaN later
    def f(z):
        xp = be.xp
        a, b = z[:, :1], z[:, 1:]
        rows = [
            0.5 * z[0:1] + 1,
            0.99 * z[1:2] + 1,
            xp.concat([-b[2:3], a[2:3]], axis=1),
            3.0 * z[3:4] + 1,
            z[4:5] * float("nan"),
            xp.where(z[5:6] > 5, z[5:6] * float("nan"), z[5:6] + 1),
        ]
        return xp.concat(rows, axis=0)

    z0 = be.asarray(np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    forward = iterate(be, Picard(), f, z0, StoppingCriteria(1e-6, max_steps=60))
    assert codes(forward, be) == [
        Status.CONVERGED,
        Status.MAX_STEPS,
        Status.STALLED,
        Status.DIVERGED,
        Status.NONFINITE,
        Status.NONFINITE,
    ]
    result = host(be, forward)
    assert result["steps"][2] == StoppingCriteria(1e-6).patience
    assert identical(result["z"][3], [0.0, 0.0])  # diverged from the start: nothing was better
    assert result["residual"][3] == pytest.approx(np.sqrt(2))
    assert identical(result["z"][4], [1.0, 1.0])
    assert np.isinf(result["residual"][4])  # never measured
    assert np.isfinite(np.delete(result["fz"], 4, axis=0)).all()
    assert np.isnan(result["fz"][4]).all()  # what f returned; the value is z


def test_patience_decides_when_a_sample_has_stalled(be):
    def f(z):
        return be.xp.concat([-z[:, 1:], z[:, :1]], axis=1)

    forward = iterate(be, Picard(), f, be.asarray(np.ones((1, 2))), StoppingCriteria(1e-6, patience=7))
    assert codes(forward, be) == [Status.STALLED]
    assert int(forward.steps[0]) == 7


def test_blow_up_is_seen_where_the_limit_itself_would_overflow(be):
    # One number per sample, so that the norm does not overflow before the limit does.
    z0 = be.asarray(np.array([[1.0]]), dtype="float32")
    forward = iterate(
        be, Picard(), lambda z: be.xp.where(z > 1, z * z, 0 * z + 1e34), z0, StoppingCriteria(1e-3, max_steps=5)
    )
    assert codes(forward, be)[0] in (Status.NONFINITE, Status.DIVERGED)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_f_infinite_at_the_first_step_returns_the_start(be, solver):
    z0 = be.asarray(np.array([[0.0, 0.0], [1.0, 1.0]]))
    forward = iterate(be, solver, lambda z: 0.5 / (z * z), z0, StoppingCriteria(1e-8, max_steps=30))
    result = host(be, forward)
    assert codes(forward, be) == [Status.NONFINITE, Status.CONVERGED] or isinstance(solver, Picard)
    assert codes(forward, be)[0] is Status.NONFINITE
    assert result["steps"][0] == 0
    assert identical(result["z"][0], [0.0, 0.0])
    assert np.isinf(result["fz"][0]).all()  # what f returned; the value is z
    if not isinstance(solver, Picard):
        assert result["z"][1] == pytest.approx(np.full(2, 0.5 ** (1 / 3)), rel=1e-7)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_what_does_not_contract_is_never_called_converged(be, truth, solver):
    # f(z) = 1.5 z: the only fixed point is 0, and from 1 plain iteration runs away.
    forward = iterate(be, solver, lambda z: 1.5 * z, be.asarray(np.ones((1, 3))), StoppingCriteria(1e-6, max_steps=60))
    (status,) = codes(forward, be)
    z, residual = host(be, forward)["z"][0], host(be, forward)["residual"][0]
    if status is Status.CONVERGED:  # at 0, where nothing is relative to ‖f(z)‖
        assert np.linalg.norm(z) <= np.finfo(float).eps ** 2
    else:
        assert residual == pytest.approx(np.linalg.norm(0.5 * z))
        assert residual <= np.linalg.norm(0.5 * np.ones(3))


# -- the residual --------------------------------------------------------------------------------------------


def test_the_residual_is_the_true_one_under_damping(be):
    # ‖f(z) − z‖ = 0.5·(1 − 0.05·0.5)^k·‖…‖: a damped step would look 20 times smaller.
    forward = iterate(
        be,
        Picard(damping=0.05),
        lambda z: 0.5 * z + 1,
        be.asarray(np.zeros((1, 4))),
        StoppingCriteria(1e-3, max_steps=500),
    )
    result = host(be, forward)
    z, fz = result["z"][0], result["fz"][0]
    assert identical(fz, 0.5 * z + 1)
    assert result["residual"][0] == pytest.approx(np.linalg.norm(fz - z), rel=1e-12)
    assert result["residual"][0] <= 1e-3 * np.linalg.norm(fz)
    k = int(result["steps"][0])
    errors = 2 * (1 - 0.05 * 0.5) ** np.arange(k + 1)  # |z_k − 2|
    met = 0.5 * errors <= 1e-3 * (2 - 0.5 * errors)
    assert met.tolist() == [False] * k + [True]


@pytest.mark.parametrize(("atol", "rtol"), [(1e-2, 0.0), (0.0, 1e-2), (5e-3, 5e-3)])
def test_absolute_and_relative_tolerance_add_up(be, truth, atol, rtol):
    control = StoppingCriteria(rtol, atol=atol, max_steps=100)
    forward = iterate(be, Picard(), lambda z: 0.7 * z + 9, be.asarray(np.zeros((1, 3))), control)
    trace = truth.picard(lambda z: 0.7 * z + 9, np.zeros(3), rtol, atol)
    assert int(forward.steps[0]) == len(trace) - 1


def test_norms_of_float16_states_do_not_overflow(be):
    # 20,000 numbers of 900: their norm is 127,279 and float16 ends at 65,504.
    b = be.asarray(np.full((1, 20_000), 450.0), dtype="float16")
    forward = iterate(be, Picard(), lambda z: 0.5 * z + b, 0 * b, StoppingCriteria(1e-2))
    result = host(be, forward)
    assert codes(forward, be) == [Status.CONVERGED]
    assert result["z"].dtype == np.float16
    assert result["residual"].dtype == np.float32
    wide = result["z"].astype(np.float64)
    # f(z) − z is rounded to float16, hence the loose comparison; its norm is not.
    assert result["residual"][0] == pytest.approx(np.linalg.norm(450 - 0.5 * wide), rel=1e-2)
    assert result["z"][0, 0] == pytest.approx(900, rel=2e-2)


@pytest.mark.parametrize("solver", WITH_ESTIMATE, ids=repr)
def test_accelerated_solvers_work_in_float16(be, truth, solver):
    problem = truth.affine(8, 3, 16, 0.6)
    f = truth.affine_map(be, problem, dtype="float16")
    forward = iterate(be, solver, f, be.asarray(0 * problem.b, dtype="float16"), StoppingCriteria(5e-3))
    result = host(be, forward)
    assert result["z"].dtype == np.float16
    assert set(result["status"]) == {Status.CONVERGED}
    assert np.linalg.norm(result["z"] - problem.root) <= 0.05 * np.linalg.norm(problem.root)


# -- counts and limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("budget", [0, 1, 2])
def test_step_budgets_of_zero_one_and_two(be, truth, solver, budget):
    problem = truth.affine(2, 3, 5, 0.9)
    plain, calls = truth.affine_map(be, problem), []

    def f(z):
        calls.append(be.to_numpy(z).copy())
        return plain(z)

    forward = iterate(be, solver, f, be.asarray(problem.b), StoppingCriteria(1e-9, max_steps=budget))
    result = host(be, forward)
    assert len(calls) == 1 + budget
    assert result["evaluations"].tolist() == [1 + budget] * 3
    assert result["steps"].tolist() == [budget] * 3
    assert set(result["status"]) == {Status.MAX_STEPS}
    for i in range(3):  # the best of what was visited
        residuals = [np.linalg.norm(problem.a[i] @ z[i] + problem.b[i] - z[i]) for z in calls]
        assert result["residual"][i] == pytest.approx(min(residuals), rel=1e-10)
        assert identical(result["z"][i], calls[int(np.argmin(residuals))][i])


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("rtol", [0.0, 1e-6])
def test_a_start_that_is_a_fixed_point_takes_no_step(be, solver, rtol):
    calls = []

    def f(z):
        calls.append(1)
        return 0.5 * z

    forward = iterate(be, solver, f, be.asarray(np.zeros((2, 3))), StoppingCriteria(rtol))
    assert codes(forward, be) == [Status.CONVERGED] * 2
    assert len(calls) == 1
    assert be.to_numpy(forward.steps).tolist() == [0, 0]
    assert be.to_numpy(forward.residual).tolist() == [0.0, 0.0]
    if solver.has_estimate:  # no pairs yet: H = −I
        result = estimate(be, solver, forward)
        v = np.random.default_rng(0).standard_normal((1, 3))
        assert result == pytest.approx(np.broadcast_to(-v, (2, 2, 3)))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_batches_of_none_and_one(be, truth, solver):
    for batch in (0, 1):
        problem = truth.affine(4, batch, 6, 0.5)
        f = truth.affine_map(be, problem)
        forward = iterate(be, solver, f, be.asarray(np.zeros((batch, 6))), StoppingCriteria(1e-10, max_steps=80))
        result = host(be, forward)
        assert result["z"].shape == (batch, 6)
        assert result["status"].tolist() == [Status.CONVERGED] * batch
        assert result["z"] == pytest.approx(problem.root, rel=1e-8, abs=1e-8)
        if solver.has_estimate:
            assert estimate(be, solver, forward).shape == (batch, 2, 6)


def test_samples_of_no_numbers_have_converged(be):
    forward = iterate(be, Broyden(), lambda z: z, be.asarray(np.zeros((3, 0))), StoppingCriteria(1e-6))
    assert codes(forward, be) == [Status.CONVERGED] * 3


# -- late checks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_late_checks_change_nothing(be, truth, solver):
    problem = truth.affine(6, 4, 8, [0.2, 0.5, 0.8, 0.3])
    results = []
    for every in (1, 7):
        calls, plain = [], truth.affine_map(be, problem)

        def f(z, calls=calls, plain=plain):
            calls.append(1)
            return plain(z)

        forward = iterate(
            be, solver, f, be.asarray(0 * problem.b), StoppingCriteria(1e-7, max_steps=200, check_every=every)
        )
        result = host(be, forward)
        if solver.has_estimate:
            result["estimate"] = estimate(be, solver, forward)
        results.append((result, len(calls) - 1))
    (first, first_steps), (late, late_steps) = results
    for name in first:
        assert identical(first[name], late[name]), name
    assert first_steps == first["steps"].max()
    assert late_steps > first_steps
    assert late_steps % 7 == 0  # it did run past the end


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_late_check_does_not_exceed_the_step_budget(be, truth, solver):
    problem = truth.affine(6, 2, 8, 0.95)
    calls, plain = [], truth.affine_map(be, problem)

    def f(z):
        calls.append(1)
        return plain(z)

    forward = iterate(be, solver, f, be.asarray(0 * problem.b), StoppingCriteria(1e-12, max_steps=10, check_every=7))
    assert len(calls) == 11
    assert be.to_numpy(forward.steps).tolist() == [10, 10]


@pytest.mark.parametrize("every", [1, 3, "auto"])
def test_the_loop_asks_no_more_often_than_it_is_told(be, every):
    asked = []

    def running(k):
        asked.append(int(be.to_numpy(k)))
        return k < 10

    end = be.loop(running, lambda k: k + 1, be.asarray(np.array(0)), 100, every)
    stride = 1 if every == "auto" else every
    assert asked == list(range(0, 10 + stride, stride))[: len(asked)]
    assert int(be.to_numpy(end)) == -(-10 // stride) * stride


# -- going on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_two_halves_of_a_solve_are_the_whole(be, truth, solver):
    problem = truth.affine(9, 3, 10, 0.9)
    f, z0 = truth.affine_map(be, problem), be.asarray(0 * problem.b)
    whole = iterate(be, solver, f, z0, StoppingCriteria(0.0, max_steps=14))
    half = iterate(be, solver, f, z0, StoppingCriteria(0.0, max_steps=7))
    rest = iterate(be, solver, f, z0, StoppingCriteria(0.0, max_steps=7), half.carry)
    a, b = host(be, whole), host(be, rest)
    for name in FIELDS:
        once_more = name == "evaluations"  # on resuming, f is asked whether it is the same
        assert identical(a[name] + once_more, b[name]), name
    if solver.has_estimate:
        assert identical(estimate(be, solver, whole), estimate(be, solver, rest))


@pytest.mark.parametrize("solver", WITH_ESTIMATE, ids=repr)
def test_continuing_leaves_the_first_estimate_alone(be, truth, solver):
    problem = truth.affine(10, 3, 10, [0.5, 0.8, 0.9])
    f, z0 = truth.affine_map(be, problem), be.asarray(0 * problem.b)
    first = iterate(be, solver, f, z0, StoppingCriteria(1e-3, max_steps=9))
    before, result = estimate(be, solver, first), host(be, first)
    for _ in range(2):
        iterate(be, solver, f, z0, StoppingCriteria(1e-12, max_steps=30), first.carry)
    assert identical(estimate(be, solver, first), before)
    after = host(be, first)
    assert all(identical(after[name], result[name]) for name in FIELDS)


@dataclass(frozen=True)
class Watched(Broyden):
    """Broyden that measures ‖H y − s‖/‖s‖ after each of its steps."""

    errors: ClassVar[list[Any]] = []

    def step(self, backend, f, z, fz, state):
        new_z, new_fz, new = super().step(backend, f, z, fz, state)
        y, s = (new_fz - new_z) - (fz - z), new_z - z
        miss = backend.norm(self.inverse_jacobian(backend, new).apply(y) - s) / backend.norm(s)
        restarted = new.basis.count() <= 2
        self.errors.append(backend.to_numpy(backend.xp.where(restarted, 0 * miss, miss)))
        return new_z, new_fz, new


def test_a_frozen_sample_that_goes_on_keeps_its_secant_equation(be, truth):
    """While sample 0 was frozen the ring moved on, so its own old vectors may be in the next slot."""
    problem = truth.affine(0, 2, 12, [0.5, 0.97])
    f, z0 = truth.affine_map(be, problem), be.asarray(0 * problem.b)
    solver = Watched(history_size=14)
    first = iterate(be, solver, f, z0, StoppingCriteria(1e-2, max_steps=13))
    steps = be.to_numpy(first.steps)
    assert steps[1] - steps[0] >= 4  # it was frozen for a while
    solver.errors.clear()
    rest = iterate(be, solver, f, z0, StoppingCriteria(1e-11, max_steps=60), first.carry)
    assert codes(rest, be) == [Status.CONVERGED] * 2
    assert host(be, rest)["z"] == pytest.approx(problem.root, rel=1e-8)
    taken = int(be.to_numpy(rest.steps)[0] - steps[0])
    assert max(e[0] for e in solver.errors[:taken]) < 1e-5


def test_going_on_stalls_no_sooner_in_company_than_alone(be):
    """Between the solves a frozen sample's candidates do not count as its progress."""

    def f(z):  # sample 0 turns in a circle once it is small, sample 1 is slow
        turn = be.xp.concat([-z[:1, 1:], z[:1, :1]], axis=1)
        return be.xp.concat([turn, 0.9 * z[1:] + 1], axis=0) if z.shape[0] == 2 else turn

    z0 = be.asarray(np.array([[1.0, 1.0], [0.0, 0.0]]))
    loose, tight = StoppingCriteria(2.0, max_steps=5), StoppingCriteria(1e-6, max_steps=100, patience=9)
    steps = []
    for start in (z0[:1], z0):
        first = iterate(be, Picard(), f, start, loose)
        rest = iterate(be, Picard(), f, start, tight, first.carry)
        assert codes(rest, be)[0] is Status.STALLED
        steps.append(int(rest.steps[0]))
    assert steps[0] == steps[1] == 9


def test_samples_that_failed_stay_failed_when_the_others_go_on(be):
    calls = []

    def f(z):
        calls.append(1)
        bad = be.xp.full_like(z[:1], float("nan")) if len(calls) > 2 else 0.5 * z[:1] + 1
        return be.xp.concat([bad, 0.9 * z[1:] + 1], axis=0)

    z0 = be.asarray(np.zeros((2, 3)))
    first = iterate(be, Picard(), f, z0, StoppingCriteria(1e-6, max_steps=5))
    rest = iterate(be, Picard(), f, z0, StoppingCriteria(1e-6, max_steps=200), first.carry)
    assert codes(first, be) == [Status.NONFINITE, Status.MAX_STEPS]
    assert codes(rest, be) == [Status.NONFINITE, Status.CONVERGED]
    assert identical(host(be, rest)["z"][0], host(be, first)["z"][0])
    assert host(be, rest)["z"][1] == pytest.approx(np.full(3, 10.0), rel=1e-4)


# -- solver states -------------------------------------------------------------------------------------------


class Nested(NamedTuple):
    inner: tuple[Any, ...]
    counter: Any  # a scalar: no batch axis
    nothing: Any


@dataclass(frozen=True)
class NestedState(Solver):
    """Plain iteration with a nested state of tuples, a scalar and a None."""

    def init(self, backend, z, fz):
        return Nested((z, (fz,)), backend.xp.sum(z[:0]), None)

    def step(self, backend, f, z, fz, state):
        new = f(fz)
        return fz, new, Nested((fz, (new,)), state.counter + 1, None)


def test_nested_states_are_frozen_leaf_by_leaf(be):
    rates = be.asarray(np.array([[0.1], [0.9]]))
    forward = iterate(
        be, NestedState(), lambda z: rates * z + 1, be.asarray(np.zeros((2, 3))), StoppingCriteria(1e-4, max_steps=99)
    )
    result, state = host(be, forward), forward.carry.state
    assert isinstance(state, Nested)
    assert identical(be.to_numpy(state.inner[0]), result["z"])
    assert identical(be.to_numpy(state.inner[1][0]), result["fz"])
    assert state.nothing is None
    assert int(be.to_numpy(state.counter)) == result["steps"].max()  # shared by all samples: never frozen
