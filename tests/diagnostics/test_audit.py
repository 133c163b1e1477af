"""The gradient audit against dense linear algebra, and residual curves against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.diagnostics import gradient_audit, residual_curve
from deqcore.errors import ConfigError, InitialIterateError

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")


B, N = 3, 8


@pytest.fixture
def problem():
    r = np.random.default_rng(0)
    a = np.stack([0.7 * r.standard_normal((N, N)) / np.sqrt(N) for _ in range(B)])
    b, g = r.standard_normal((B, N)), r.standard_normal((B, N))
    u = np.stack([np.linalg.solve((np.eye(N) - a[i]).T, g[i]) for i in range(B)])
    return a, b, g, u


def audit(be, problem, strategy, g=None, options=None, **more):
    a, b, own, _ = problem

    def f(z, a, b):
        return be.xp.sum(a * z[:, None, :], axis=2) + b

    return gradient_audit(
        f,
        be.asarray(np.zeros((B, N))),
        be.asarray(a),
        be.asarray(b),
        cotangent=be.asarray(own if g is None else g),
        forward__rtol=1e-10,
        forward__max_steps=200,
        backward__strategy=strategy,
        backward__options=options or {},
        **more,
    )


def cosine(a, b):
    return np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_jacobian_free_against_the_closed_form(every, problem):
    *_, g, u = problem
    result = audit(every, problem, "jacobian-free", forward__solver="picard")  # the smallest program in JAX
    assert result.cosine == pytest.approx(cosine(g, u), rel=1e-7)
    assert result.norm_ratio == pytest.approx(np.linalg.norm(g, axis=1) / np.linalg.norm(u, axis=1), rel=1e-7)
    assert result.error == pytest.approx(np.linalg.norm(g - u, axis=1) / np.linalg.norm(u, axis=1), rel=1e-7)
    assert result.vjps.tolist() == [0] * B
    assert (result.exact_residual < 1e-9).all()
    assert (result.exact_vjps <= N).all()


def test_gradients_of_the_arguments(be, problem):
    """The gradients of A are u zᵀ and those of b are u."""
    a, b, g, u = problem
    z = np.stack([np.linalg.solve(np.eye(N) - a[i], b[i]) for i in range(B)])
    whole = [np.concatenate([np.einsum("bi,bj->bij", v, z).ravel(), v.ravel()]) for v in (g, u)]
    result = audit(be, problem, "jacobian-free")
    assert result.gradient_cosine == pytest.approx(cosine(*whole), rel=1e-6)
    assert result.gradient_norm_ratio == pytest.approx(np.linalg.norm(whole[0]) / np.linalg.norm(whole[1]), rel=1e-6)


def test_gradients_of_complex_arguments(be):
    """The gradients of a and x are u zᴴ and u for u = (I − Aᴴ)⁻¹ g, and g for jacobian-free."""
    r = np.random.default_rng(2)
    x, g = (r.standard_normal((2, 2)) + 1j * r.standard_normal((2, 2)) for _ in range(2))
    a = np.array([[0.45j, 0.1], [0.05, -0.4j]])
    z, u = np.linalg.solve(np.eye(2) - a, x.T).T, np.linalg.solve((np.eye(2) - a).conj().T, g.T).T
    p, q = (np.concatenate([np.einsum("bi,bj->ij", v, z.conj()).ravel(), v.ravel()]) for v in (g, u))
    z0, a, x, g = (be.asarray(v, dtype="complex128") for v in (0 * x, a, x, g.conj() if be.autodiff.conjugates else g))
    f = lambda z, a, x: be.xp.sum(a[None] * z[:, None, :], axis=2) + x
    settings = {"forward__rtol": 1e-10, "backward__strategy": "jacobian-free"}
    result = gradient_audit(f, z0, a, x, cotangent=g, **settings)
    norms = np.linalg.norm(p), np.linalg.norm(q)
    assert result.gradient_cosine == pytest.approx(np.vdot(p, q).real / norms[0] / norms[1], rel=1e-6)
    assert result.gradient_norm_ratio == pytest.approx(norms[0] / norms[1], rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "options"), [("phantom", {"steps": 3, "damping": 1.0}), ("neumann", {"terms": 2})]
)
def test_a_truncated_series(be, problem, strategy, options):
    """Both are g + Jᵀg + JᵀJᵀg here: one differentiates three steps from z*, the other sums."""
    a, _, g, u = problem
    pulled = np.einsum("bij,bi->bj", a, g)
    series = g + pulled + np.einsum("bij,bi->bj", a, pulled)
    result = audit(be, problem, strategy, options=options)
    assert result.cosine == pytest.approx(cosine(series, u), rel=1e-6)
    assert np.isnan(result.vjps).all() == (strategy == "phantom")


def test_exact_and_certified_agree_with_the_reference(be, problem):
    exact = audit(be, problem, "exact-ift", options={"rtol": 1e-9})
    assert (exact.error < 1e-7).all()
    reuse = audit(be, problem, "broyden-reuse", options={"max_relative_error": 0.05})
    assert (reuse.error <= 0.05).all()
    assert (reuse.reported <= 0.05).all()


def test_a_sample_of_the_batch(be, problem):
    whole, part = (audit(be, problem, "jacobian-free", samples=k, batched_args=(0, 1)) for k in (None, 2))
    assert part.rows.tolist() == [0, 2]
    assert part.cosine == pytest.approx(whole.cosine[[0, 2]])
    assert "2 samples" in part.summary()


def test_a_module_that_nothing_is_passed_to():
    torch.manual_seed(0)
    cell = torch.nn.Linear(4, 4)
    with torch.no_grad():
        cell.weight *= 0.5
    result = gradient_audit(cell, torch.zeros(2, 4), cotangent=torch.ones(2, 4), backward__strategy="exact-ift")
    assert result.cosine == pytest.approx([1.0, 1.0], abs=1e-5)
    assert np.isnan(result.gradient_cosine)


def test_zero_cotangent_nan_and_an_empty_batch(be, problem):
    g = problem[2].copy()
    g[0], g[1] = 0.0, np.nan
    result = audit(be, problem, "jacobian-free", g=g)
    assert (result.cosine[0], result.norm_ratio[0], result.error[0]) == (1.0, 1.0, 0.0)
    assert np.isnan(result.error[1])
    assert np.isfinite(result.error[2])
    empty = be.asarray(np.zeros((0, 4)))
    nothing = gradient_audit(lambda z: 0.5 * z, empty, cotangent=empty, backward__strategy="jacobian-free")
    assert nothing.cosine.shape == (0,)
    assert nothing.summary() == "The batch is empty."


def test_an_f_that_couples_the_samples_is_found_out(every):
    settings = {"cotangent": every.asarray(np.ones((3, 2))), "backward__strategy": "jacobian-free"}
    settings["forward__solver"] = "picard"  # the audit itself finds it: small programs in JAX are enough
    zero = every.asarray(np.zeros((3, 2)))
    alone = gradient_audit(lambda z: 0.5 * z + 1, zero, **settings)
    assert alone.coupling == 0
    assert "COUPLES" not in alone.summary()
    # Centred over the batch: two thirds of a unit stay, a third of it goes to each of the two others.
    mixed = gradient_audit(lambda z: 0.5 * (z - every.xp.mean(z, axis=0)) + 1, zero, **settings)
    assert mixed.coupling == pytest.approx(np.sqrt(2 / 9 / (4 / 9 + 2 / 9)))
    assert "forward.batch = false" in mixed.summary()
    whole = gradient_audit(lambda z: 0.5 * (z - every.xp.mean(z, axis=0)) + 1, zero, forward__batch=False, **settings)
    assert whole.coupling == 0


def test_bad_input():
    f, z = (lambda z: 0.5 * z), np.zeros((2, 2))
    with pytest.raises(ConfigError, match="samples must be .*got 0"):
        gradient_audit(f, z, cotangent=z, samples=0)
    with pytest.raises(ConfigError, match="max_vjps must be .*got 0"):
        gradient_audit(f, z, cotangent=z, max_vjps=0)
    with pytest.raises(ConfigError, match="batched_args"):
        gradient_audit(f, z, cotangent=z, batched_args=(0,))
    with pytest.raises(InitialIterateError, match="cotangent"):
        gradient_audit(f, z, cotangent=np.zeros((2, 3)))


def test_a_plain_iterations_curve_is_geometric(every):
    """z_{k+1} = r z_k + 1 from 0: residual r^k, value (1 − r^(k+1))/(1 − r)."""
    rates = np.array([[0.5], [0.8]])
    stored = every.asarray(rates)
    z0 = every.asarray(np.zeros((2, 1)))
    result = residual_curve(lambda z: stored * z + 1, z0, steps=12, forward__solver="picard", forward__rtol=1e-3)
    k = np.arange(13)[:, None]
    expected = rates.T**k * (1 - rates.T) / (1 - rates.T ** (k + 1))
    met = np.argmax(expected[:, 0] <= 1e-3)
    assert result.steps.tolist() == [met, 12]
    assert result.residual[: met + 1, 0] == pytest.approx(expected[: met + 1, 0], rel=1e-9)
    assert result.residual[:, 1] == pytest.approx(expected[:, 1], rel=1e-9)
    assert result.rate() == pytest.approx([0.5, 0.8], rel=0.1)
    assert result.steps_to(1e-3).tolist() == [met, -1]
    assert result.steps_to(0.5).tolist() == [np.argmax(each <= 0.5) for each in expected.T]


def test_a_curve_is_the_solve_that_fixed_point_makes(be, problem):
    a, b = (be.asarray(each) for each in problem[:2])

    def f(z):
        return be.xp.sum(a * z[:, None, :], axis=2) + b

    z0 = be.asarray(np.zeros((B, N)))
    settings = {"forward__solver": "broyden", "forward__rtol": 1e-9}
    curve = residual_curve(f, z0, **settings)
    sol = deqcore.fixed_point(f, z0, **settings)
    assert curve.steps.tolist() == be.to_numpy(sol.steps).tolist()
    size = np.linalg.norm(be.to_numpy(sol.value), axis=1)
    assert curve.residual[-1] * size == pytest.approx(be.to_numpy(sol.residual), rel=1e-5)


def test_a_curve_of_a_solve_that_fails(be):
    result = residual_curve(lambda z: 0 * z + float("nan"), be.asarray(np.zeros((1, 1))), steps=30)
    assert len(result.residual) == 1
    assert np.isnan(result.residual).all()
    assert np.isnan(result.rate()).all()
    empty = residual_curve(lambda z: 0.5 * z, be.asarray(np.zeros((0, 2))), steps=3)
    assert empty.residual.shape[1] == 0
    with pytest.raises(ConfigError, match="steps must be .*got -1"):
        residual_curve(lambda z: z, np.zeros((1, 1)), steps=-1)


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_a_curve_evaluates_f_as_often_as_the_solve(solver):
    calls = []

    def f(z):
        calls.append(1)
        return 0.9 * np.cos(z) + np.array([[0.1], [0.7]])

    settings = {"forward__solver": solver, "forward__rtol": 1e-9, "forward__on_failure": "ignore"}
    sol = deqcore.fixed_point(f, np.zeros((2, 1)), forward__max_steps=30, **settings)
    expected = len(calls)
    calls.clear()
    curve = residual_curve(f, np.zeros((2, 1)), steps=30, **settings)
    assert len(calls) == expected == 1 + int(sol.steps.max())
    assert curve.steps.tolist() == sol.steps.tolist()


def test_a_curve_goes_on_past_steps_without_progress():
    """A rotation by 90° keeps its residual: plain iteration stalls after `patience` steps, and not before."""
    turn = lambda z: np.concatenate([-z[:, 1:], z[:, :1]], axis=1)
    curve = residual_curve(turn, np.ones((1, 2)), steps=60, forward__solver="picard", forward__patience=23)
    assert curve.steps.tolist() == [23]
    assert curve.residual == pytest.approx(np.full((24, 1), np.sqrt(2.0)))


def test_a_curve_shows_refused_steps():
    curve = residual_curve(lambda z: z - 3.0 * (np.sqrt(z) - 0.5), np.full((1, 2), 4.0), forward__solver="broyden")
    assert not np.isfinite(curve.residual[1]).any()
    assert curve.residual[-1, 0] < 1e-6
