"""Certificates over random spectra, verified by dense linear algebra that shares no code with them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deqcore
from deqcore.backward.broyden_reuse import BroydenReuse
from deqcore.backward.exact_ift import ExactIFT
from deqcore.linear.certified import solve_certified
from deqcore.solve.loop import iterate
from deqcore.solvers.broyden import Broyden
from deqcore.types import Status, StoppingCriteria

N = 30


@pytest.fixture(autouse=True)
def _nan_is_no_warning():
    with np.errstate(all="ignore"):
        yield


def spectrum(rng, slow, radius, skew):
    """One J: `slow` eigenvalues from 0.9 to 0.99, the others within ±radius; skew vectors make it non-normal."""
    values = rng.uniform(-radius, radius, N)
    values[:slow] = rng.uniform(0.9, 0.99, slow)
    vectors = np.linalg.qr(rng.standard_normal((N, N)))[0] + skew * rng.standard_normal((N, N)) / np.sqrt(N)
    return vectors @ np.diag(values) @ np.linalg.inv(vectors)


def reuse(be, jacobian, g, *, b=None, rtol=1e-5, **options):
    """Forward solve of z = J z + b by Broyden, then the strategy: u and its report on the host."""
    stored = be.asarray(jacobian)
    shift = be.asarray(np.random.default_rng(1).standard_normal(g.shape) if b is None else b)
    solver = Broyden(history_size=60)
    forward = iterate(
        be,
        solver,
        lambda z: be.xp.sum(stored * z[:, None, :], axis=2) + shift,
        0 * shift,
        StoppingCriteria(rtol, max_steps=60),
    )
    vjps = []

    def vjp(u):
        vjps.append(1)
        return be.xp.sum(stored * u[:, :, None], axis=1)

    strategy = BroydenReuse(**({"fallback": "none"} | options))
    estimate = solver.secant_estimate(be, forward.carry.state)
    u, report = strategy.solve_adjoint(be, vjp, be.asarray(g), estimate)
    return be.to_numpy(u), type(report)(*(be.to_numpy(leaf) for leaf in report)), len(vjps)


def residual(jacobian, g, u):
    return np.linalg.norm(g + np.einsum("bij,bi->bj", jacobian, u) - u, axis=1) / np.linalg.norm(g, axis=1)


def exact(jacobian, g):
    return np.stack([np.linalg.solve((np.eye(N) - j).T, each) for j, each in zip(jacobian, g, strict=True)])


def krylov_vjps(jacobian, g, goal):
    """How many products plain GMRES needs, by dense least squares in each Krylov space."""
    a, basis = np.eye(N) - jacobian.T, (g / np.linalg.norm(g))[:, None]
    for k in range(1, N + 1):
        image = a @ basis
        left = g - image @ np.linalg.lstsq(image, g, rcond=1e-13)[0]
        if np.linalg.norm(left) <= goal * np.linalg.norm(g):
            return k
        basis = np.linalg.qr(np.column_stack([basis, a @ basis[:, -1]]))[0]
    return N


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10_000),
    slow=st.integers(0, 6),
    radius=st.floats(0.1, 0.8),
    skew=st.floats(0.0, 0.6),
    target=st.sampled_from([0.1, 0.01]),
)
def test_a_certificate_is_true(be, seed, slow, radius, skew, target):
    """What is reported as met is met; the reported residual is the real one; the error is of the reported size."""
    rng = np.random.default_rng(seed)
    jacobian = np.stack([spectrum(rng, slow, radius, skew) for _ in range(3)])
    g = rng.standard_normal((3, N))
    u, report, vjps = reuse(be, jacobian, g, max_relative_error=target)
    true, met = residual(jacobian, g, u), report.status == int(Status.CONVERGED)
    assert (true[met] <= target * (1 + 1e-9)).all()
    assert report.residual == pytest.approx(true, rel=1e-5, abs=1e-10)
    error = np.linalg.norm(u - exact(jacobian, g), axis=1) / np.linalg.norm(exact(jacobian, g), axis=1)
    assert (report.error >= error / 6).all()
    assert report.vjps.max() == vjps <= 40
    assert met.all()  # N = 30 vjps end every space


@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), slow=st.integers(0, 3), radius=st.floats(0.2, 0.8), skew=st.floats(0.0, 0.4))
def test_reuse_costs_no_more_than_gmres_and_a_vjp(seed, slow, radius, skew):
    rng = np.random.default_rng(seed)
    jacobian, g = spectrum(rng, slow, radius, skew)[None], rng.standard_normal((1, N))
    numpy = deqcore.get_backend(backend="numpy")
    for target in (0.1, 0.01):
        u, report, _ = reuse(numpy, jacobian, g, max_relative_error=target)
        assert report.vjps[0] <= krylov_vjps(jacobian[0], g[0], residual(jacobian, g, u)[0] * (1 + 1e-9)) + 1


def test_a_hard_sample_takes_nothing_from_the_easy_ones(be):
    """A cyclic shift needs N vjps and gets 20; its batch mates must not be cut short with it."""
    rng = np.random.default_rng(0)
    easy = [0.5 * rng.standard_normal((N, N)) / np.sqrt(N) for _ in range(3)]
    jacobian = np.stack([easy[0], 0.999 * np.roll(np.eye(N), 1, axis=0), *easy[1:]])
    g = rng.standard_normal((4, N))
    b = rng.standard_normal((4, N))
    u, report, _ = reuse(be, jacobian, g, b=b, max_relative_error=1e-3, max_refine_vjps=20, rtol=0.5)
    assert report.status.tolist()[0::2] == [int(Status.CONVERGED)] * 2
    assert report.status[1] == int(Status.MAX_STEPS)
    assert report.vjps[1] == 20
    rest = [0, 2, 3]
    alone, single, _ = reuse(
        be, jacobian[rest], g[rest], b=b[rest], max_relative_error=1e-3, max_refine_vjps=20, rtol=0.5
    )
    assert single.vjps.tolist() == report.vjps[rest].tolist()
    assert u[rest] == pytest.approx(alone, rel=1e-7)
    assert (residual(jacobian, g, u)[rest] <= 1e-3).all()


def test_zero_and_nan_cotangents_stay_in_their_rows(be):
    rng = np.random.default_rng(1)
    jacobian = np.stack([spectrum(rng, 1, 0.5, 0.2) for _ in range(3)])
    g = rng.standard_normal((3, N))
    g[0], g[1, 4] = 0.0, np.nan
    u, report, _ = reuse(be, jacobian, g, max_relative_error=0.05)
    assert not u[0].any()
    assert (report.vjps[0], report.residual[0], report.error[0]) == (0, 0.0, 0.0)
    assert report.status.tolist() == [int(Status.CONVERGED), int(Status.NONFINITE), int(Status.CONVERGED)]
    assert np.isnan(report.residual[1])
    assert np.isnan(u[1]).all()
    assert residual(jacobian, g, u)[2] <= 0.05


@pytest.mark.parametrize("fallback", ["none", "jacobian-free", "exact-ift"])
@pytest.mark.parametrize("target", [0.1, 0.01])
def test_a_singular_system_is_reported(be, fallback, target):
    """J has the eigenvalue 1, and g has a part along its left vector: no solution exists, and none may be certified.

    u grows until rounding hides g, and the residual that is measured then is small in some of these systems.
    """
    rng = np.random.default_rng(2)
    v = np.linalg.qr(rng.standard_normal((8, N, N)))[0]
    values = np.concatenate([np.ones((8, 1)), rng.uniform(-0.5, 0.5, (8, N - 1))], axis=1)
    jacobian = v @ (values[:, :, None] * v.swapaxes(1, 2))
    g = rng.standard_normal((8, N))
    g += np.sign((v[:, :, 0] * g).sum(1))[:, None] * v[:, :, 0]
    z = rng.standard_normal((8, N))
    b = z - np.einsum("bij,bj->bi", jacobian, z)
    u, report, _ = reuse(be, jacobian, g, b=b, max_relative_error=target, fallback=fallback)
    assert int(Status.CONVERGED) not in report.status
    assert (report.residual > target).all()
    # Both are measured where rounding is as large as they are.
    assert (report.residual > residual(jacobian, g, u) / 20).all()


def test_no_pairs_yet_is_plain_gmres(be):
    """With b = 0 the start is the solution: Broyden takes no step and has no estimate."""
    rng = np.random.default_rng(3)
    jacobian, g = spectrum(rng, 2, 0.6, 0.1)[None], rng.standard_normal((1, N))
    u, report, _ = reuse(be, jacobian, g, b=np.zeros((1, N)), max_relative_error=0.01)
    true = residual(jacobian, g, u)[0]
    assert true <= 0.01
    assert report.vjps[0] == krylov_vjps(jacobian[0], g[0], true * (1 + 1e-9))


def test_without_preconditioner_or_judge(be):
    rng = np.random.default_rng(4)
    jacobian, g = spectrum(rng, 0, 0.5, 0.1)[None], rng.standard_normal((1, N))
    stored = be.asarray(jacobian)
    found = solve_certified(
        be,
        lambda u: be.xp.sum(stored * u[:, :, None], axis=1),
        be.asarray(g),
        None,
        max_relative_error=0.01,
        max_vjps=N,
    )
    assert bool(be.to_numpy(found.met)[0])
    assert residual(jacobian, g, be.to_numpy(found.u))[0] <= 0.01


def diagonal(share, spread=0.0, n=64, samples=8):
    """J = diag(.3 ± spread, …, .999), b that does not excite the slow mode, and g that shows `share` of it."""
    rng = np.random.default_rng(int(1000 * share))
    modes = 0.3 + spread * rng.uniform(-1, 1, (samples, n))
    b, g = rng.standard_normal((2, samples, n))
    modes[:, -1], b[:, -1], g[:, -1] = 0.999, 0.0, 0.0
    g[:, -1] = share * np.linalg.norm(g, axis=1) / np.sqrt(1 - share**2)
    return modes[:, :, None] * np.eye(n), b, g


def error_of(jacobian, g, u):
    n = g.shape[1]
    expected = np.stack([np.linalg.solve((np.eye(n) - j).T, each) for j, each in zip(jacobian, g, strict=True)])
    return np.linalg.norm(u - expected, axis=1) / np.linalg.norm(expected, axis=1)


@pytest.mark.parametrize(("share", "spread"), [(0.01, 0.0), (0.05, 0.0), (0.2, 0.0), (0.05, 0.3), (0.2, 0.3)])
def test_a_mode_that_the_forward_solve_never_met_is_met_before_it_is_certified(be, share, spread):
    """After one product the error was stated as 0.072 and was 0.998."""
    jacobian, b, g = diagonal(share, spread)
    u, report, _ = reuse(be, jacobian, g, b=b, max_relative_error=0.1)
    done = report.status == int(Status.CONVERGED)
    assert done.all()
    assert (error_of(jacobian, g, u) <= 0.1).all()
    exact = report.residual <= 1e-10  # the space of two distinct modes closes after two products
    assert (report.vjps >= np.where(exact, 2, 3)).all()


@pytest.mark.parametrize("estimate", [True, False])
def test_one_or_two_products_certify_nothing(be, estimate):
    jacobian, b, g = diagonal(0.05, 0.3)
    stored = be.asarray(jacobian)
    for budget in (1, 2):
        if estimate:
            _, report, _ = reuse(be, jacobian, g, b=b, max_relative_error=0.1, max_refine_vjps=budget)
            met = report.status == int(Status.CONVERGED)
        else:
            found = solve_certified(
                be, lambda u: be.xp.sum(stored * u[:, :, None], axis=1), be.asarray(g), None, max_relative_error=0.1,
                max_vjps=budget,
            )  # fmt: skip
            met = be.to_numpy(found.met)
        assert not met.any()


def test_what_is_certified_is_within_the_target():
    """Random tanh cells and dense slow modes: at most 1 % of the samples are above the target."""
    be = deqcore.get_backend(backend="numpy")
    wrong = count = 0
    for seed in range(40):
        rng = np.random.default_rng(7000 + seed)
        slow = spectrum(rng, seed % 4, 0.4, 0.4)
        gain = rng.uniform(0.6, 1.2, N)
        dense = (
            rng.standard_normal((N, N)) * gain[:, None] / np.sqrt(N) * np.cosh(rng.standard_normal(N))[:, None] ** -2
        )
        for jacobian in (slow, dense):
            g = rng.standard_normal((1, N))
            u, report, _ = reuse(be, jacobian[None], g, max_relative_error=0.1)
            assert report.status[0] == int(Status.CONVERGED)
            wrong += int(error_of(jacobian[None], g, u)[0] > 0.1)
            count += 1
    assert wrong <= 0.01 * count


@pytest.mark.parametrize(
    ("radius", "slow", "share", "slower", "behind"),
    [
        (0.2, 0.9, 0.9, 0.99, 0.07),
        (0.1, 0.9, 0.6, 0.99, 0.07),
        (0.02, 0.9, 0.9, 0.99, 0.03),
        (0.1, 0.8, 0.6, 0.995, 0.05),
    ],
)
def test_a_slower_mode_behind_a_slow_one_is_met(be, radius, slow, share, slower, behind):
    """The residual falls fast for three dimensions, and stops at the slower mode."""
    rng = np.random.default_rng(11)
    modes = rng.uniform(-radius, radius, (16, 64))
    modes[:, 0], modes[:, -1] = slow, slower
    g = rng.standard_normal((16, 64))
    g[:, [0, -1]] = 0.0
    g *= np.sqrt(1 - share**2 - behind**2) / np.linalg.norm(g, axis=1, keepdims=True)
    g[:, 0], g[:, -1] = share, behind
    stored = be.asarray(modes)
    found = solve_certified(be, lambda u: stored * u, be.asarray(g), None, max_relative_error=0.1, max_vjps=40)
    assert be.to_numpy(found.met).all()
    expected = g / (1.0 - modes)
    error = np.linalg.norm(be.to_numpy(found.u) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert (error <= 0.1).all()


def test_rounding_that_a_poor_estimate_makes_large_is_measured(be):
    """The recurrence of A M falls to any size; the residual of A u stays where the rounding of A (M v) leaves it."""
    rng = np.random.default_rng(12)
    n, samples, target = 40, 6, 0.01
    jacobian = rng.uniform(-0.4, 0.4, (samples, n, n)) / np.sqrt(n)
    g = rng.standard_normal((samples, n))
    large = 0.02 / np.finfo(g.dtype).eps
    left, right = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng.standard_normal((2, samples, n)))
    stored, p, q = be.asarray(jacobian), be.asarray(large * left), be.asarray(right)
    xp = be.xp

    def estimate(v):
        return v + p * xp.sum(q * v, axis=1)[:, None]

    def vjp(u):
        return xp.sum(stored * u[:, :, None], axis=1)

    found = solve_certified(be, vjp, be.asarray(g), estimate, max_relative_error=target, max_vjps=40)
    u, met = be.to_numpy(found.u), be.to_numpy(found.met)
    assert met.all()
    assert (residual(jacobian, g, u) <= target).all()
    assert (error_of(jacobian, g, u) <= target).all()
    assert (be.to_numpy(found.vjps) <= 35).all()  # all 40 were spent, and all samples reported as failed


def exact_ift(be, jacobian, g, dtype="float64", **options):
    """`exact-ift` for given Jacobians, without any estimate."""
    stored = be.asarray(jacobian, dtype=dtype)
    strategy = ExactIFT(**options)
    with be.errstate():
        u, report = strategy.solve_adjoint(
            be, lambda v: be.xp.sum(stored * v[:, :, None], axis=1), be.asarray(g, dtype=dtype), None
        )
    return be.to_numpy(u), report._replace(**{name: be.to_numpy(part) for name, part in report._asdict().items()})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("target", [0.3, 0.1, 0.01, 1e-4])
def test_exact_ift_stops_at_an_estimated_error_of_its_own(be, target, dtype):
    """Tanh cells and slow modes against dense inverses; no estimate, as behind picard."""
    wrong = count = 0
    for seed in range(12):
        rng = np.random.default_rng(8000 + seed)
        slow = spectrum(rng, seed % 3, 0.4, 0.4)
        dense = rng.standard_normal((N, N)) * 0.9 / np.sqrt(N) * np.cosh(rng.standard_normal(N))[:, None] ** -2
        jacobian, g = np.stack([slow, dense]), rng.standard_normal((2, N))
        u, report = exact_ift(be, jacobian, g, dtype, max_relative_error=target)
        assert (report.status == int(Status.CONVERGED)).all()
        assert (report.error <= target).all()
        assert (residual(jacobian, g, u) <= 1.01 * target).all()
        wrong += int((error_of(jacobian, g, u) > target).sum())
        count += 2
    assert wrong <= 0.05 * count


@pytest.mark.parametrize(("share", "spread"), [(0.05, 0.0), (0.2, 0.0), (0.05, 0.3), (0.2, 0.3)])
def test_exact_ift_meets_a_hidden_mode(be, share, spread):
    jacobian, _, g = diagonal(share, spread)
    u, report = exact_ift(be, jacobian, g, max_relative_error=0.1)
    assert (report.status == int(Status.CONVERGED)).all()
    assert (error_of(jacobian, g, u) <= 0.1).all()


def test_a_space_that_misses_the_target_is_solved_directly(be):
    rng = np.random.default_rng(31)
    jacobian = spectrum(rng, 3, 0.9, 0.6)[None]
    g = rng.standard_normal((1, N))
    u, report = exact_ift(be, jacobian, g, max_relative_error=1e-3, max_steps=N + 8)
    assert report.status[0] == int(Status.CONVERGED)
    assert error_of(jacobian, g, u)[0] <= 1e-3
    _, report = exact_ift(be, jacobian, g, max_relative_error=1e-6, max_steps=3, direct=0)
    assert report.status[0] == int(Status.MAX_STEPS)
    assert report.vjps[0] <= 3


def test_a_cotangent_of_zero_and_one_of_nan_are_told_apart(be):
    rng = np.random.default_rng(32)
    jacobian, g = np.stack([spectrum(rng, 0, 0.4, 0.4)] * 3), rng.standard_normal((3, N))
    g[0], g[1, 4] = 0.0, np.nan
    u, report = exact_ift(be, jacobian, g, max_relative_error=0.1)
    assert report.status.tolist() == [int(Status.CONVERGED), int(Status.NONFINITE), int(Status.CONVERGED)]
    assert not u[0].any()
    assert (report.vjps[0], report.error[0]) == (0, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_cotangent_gives_nan_in_its_row_alone_and_in_a_batch(be, bad):
    rng = np.random.default_rng(32)
    jacobian, g = np.stack([spectrum(rng, 0, 0.4, 0.4)] * 2), rng.standard_normal((2, N))
    g[1, 4] = bad
    for rows in (slice(0, 2), slice(1, 2)):
        u, _ = exact_ift(be, jacobian[rows], g[rows], max_relative_error=0.1)
        assert np.isnan(u[-1]).all()
        assert np.isfinite(u[:-1]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_relative_error": 0.1, "rtol": 1e-3}, "Set one of them"),
        ({"max_relative_error": 0.1, "solver": "broyden"}, "needs the solver 'gmres'"),
        ({"max_relative_error": 0.1, "start": "reuse"}, "needs the start 'zero'"),
        ({"max_relative_error": 1.5}, "between 0 and 1"),
        ({"reuse": "judge"}, "must be 'none', 'witness' or 'precondition'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ExactIFT(**options)


@pytest.mark.parametrize("solver", ["picard", "broyden", "anderson"])
def test_exact_ift_to_an_error_works_behind_every_solver(solver):
    rng = np.random.default_rng(33)
    w = 0.5 * rng.standard_normal((20, 20)) / np.sqrt(20)
    x, g = rng.standard_normal((2, 5, 20))
    chosen = {"forward__solver": solver, "backward__strategy": "exact-ift"}
    _, (dx,) = deqcore.vjp(
        lambda z, x: np.tanh(z @ w) + x, 0 * x, x, cotangent=g, **chosen, backward__options={"max_relative_error": 0.01}
    )
    _, (expected,) = deqcore.vjp(
        lambda z, x: np.tanh(z @ w) + x, 0 * x, x, cotangent=g, **chosen, backward__options={"rtol": 1e-8}
    )
    assert (np.linalg.norm(dx - expected, axis=1) <= 0.01 * np.linalg.norm(expected, axis=1)).all()


def test_reuse_is_an_option_that_saves_vjps(be):
    """A witness lets the same space end earlier, and its target is met."""
    rng = np.random.default_rng(34)
    jacobian = np.stack([spectrum(rng, 1, 0.5, 0.4) for _ in range(8)])
    g = rng.standard_normal((8, N))
    witnessed, told, _ = reuse(be, jacobian, g, max_relative_error=0.1, fallback="none")
    _, alone, _ = reuse(be, jacobian, g, max_relative_error=0.1, reuse="none", fallback="none")
    preconditioned, deflated, _ = reuse(be, jacobian, g, max_relative_error=0.1, reuse="precondition", fallback="none")
    for report in (told, alone, deflated):
        assert (report.status == int(Status.CONVERGED)).all()
    assert told.vjps.sum() <= alone.vjps.sum()
    assert (error_of(jacobian, g, witnessed) <= 0.1).all()
    assert (error_of(jacobian, g, preconditioned) <= 0.1).all()


@pytest.mark.parametrize("reused", ["none", "witness", "precondition"])
def test_an_empty_batch_has_an_empty_solution(be, reused):
    u, report, _ = reuse(be, np.zeros((0, N, N)), np.zeros((0, N)), max_relative_error=0.1, reuse=reused)
    assert u.shape == (0, N)
    assert report.status.shape == (0,)
