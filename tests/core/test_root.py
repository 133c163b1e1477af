"""`root` against closed forms, SciPy and the implicit function theorem."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

import deqcore
from deqcore.errors import ConfigError, ConvergenceWarning, ProblemError

SOLVERS = ["auto", "anderson", "broyden", "newton-krylov"]


def number(be, a):
    return be.asarray(np.asarray(a, float))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("factor", [1.0, -30.0, 1e-6, -1e8])
def test_sign_and_scale_of_g_do_not_matter(be, solver, factor):
    a = np.array([[2.0, 3.0], [0.5, 7.0]])
    sol = deqcore.root(lambda z: factor * (z * z + z - number(be, a)), number(be, a), forward__solver=solver)
    truth = (-1 + np.sqrt(1 + 4 * a)) / 2
    assert sol.converged.all()
    assert np.abs(be.to_numpy(sol.value) - truth).max() < 1e-6
    found = be.to_numpy(sol.value)
    left = factor * (found * found + found - a)
    assert np.allclose(be.to_numpy(sol.residual), np.linalg.norm(left, axis=1), rtol=1e-3, atol=1e-14 * abs(factor))
    assert np.allclose(be.to_numpy(sol.fz), left, rtol=1e-3, atol=1e-14 * abs(factor))


def test_a_system_agrees_with_scipy(be):
    rng = np.random.default_rng(0)
    a, b = np.eye(6) * 3 + rng.standard_normal((6, 6)), rng.standard_normal(6)
    w, x = number(be, a), number(be, b)
    truth = optimize.root(lambda z: a @ z + np.sin(z) - b, np.zeros(6)).x
    sol = deqcore.root(lambda z: z @ w.T + be.xp.sin(z) - x[None, :], number(be, np.zeros((1, 6))))
    assert sol.converged.all()
    assert np.abs(be.to_numpy(sol.value)[0] - truth).max() < 1e-6


@pytest.mark.parametrize("solver", ["auto", "broyden", "newton-krylov"])
def test_a_start_far_away_does_not_loosen_the_tolerance(be, solver):
    """z² = 2 from 300, where |g| is 9e4 and a Newton step 150: ended at z = 3.6 as CONVERGED."""
    sol = deqcore.root(lambda z: z * z - 2.0, be.asarray([[300.0]]), forward__solver=solver, forward__rtol=1e-6)
    assert sol.converged.all()
    assert be.to_numpy(sol.value) == pytest.approx(math.sqrt(2.0), abs=1e-6 * 600 * math.sqrt(2.0) / 2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_slope_that_falls_on_the_way_does_not_loosen_the_tolerance(be, solver):
    """exp(z) = 2 from 14: ended in float32 at z = 6.3, where g is 546, as CONVERGED. The other sample needs nothing."""
    z0, a = np.array([[14.0], [0.5]]), np.array([[2.0], [2.0]])
    one = lambda rows: be.asarray(a[rows], dtype="float32")
    sol = deqcore.root(lambda z: be.xp.exp(z) - one([0, 1]), be.asarray(z0, dtype="float32"), forward__solver=solver)
    assert sol.converged.all()
    found = be.to_numpy(sol.value).astype(float)
    assert np.abs(found - math.log(2.0)).max() < 1e-3
    assert np.allclose(be.to_numpy(sol.residual), np.abs(np.exp(found) - 2.0)[:, 0], atol=1e-6)
    alone = deqcore.root(lambda z: be.xp.exp(z) - one([1]), be.asarray(z0[1:], dtype="float32"), forward__solver=solver)
    assert int(sol.steps[1]) == int(alone.steps[0])
    assert np.array_equal(be.to_numpy(sol.value)[1:], be.to_numpy(alone.value))


def test_a_root_that_continued_has_its_gradient():
    """d log a / da = 1/a, to the second order, also through torch.func.vmap."""
    torch = pytest.importorskip("torch")
    a = torch.tensor([[2.0], [9e5]], dtype=torch.float64, requires_grad=True)
    z0 = torch.full((2, 1), 14.0, dtype=torch.float64)
    f = lambda a: deqcore.root(lambda z, a: torch.exp(z) - a, z0, a, forward__rtol=1e-9, forward__atol=1e-12).value
    (grad,) = torch.autograd.grad(f(a).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), a)
    assert torch.allclose(grad, 1 / a, rtol=1e-6)
    assert torch.allclose(second, -1 / a**2, rtol=1e-6)
    both = torch.func.vmap(f)(torch.stack([a.detach(), 2 * a.detach()]))
    assert torch.allclose(both, torch.stack([a, 2 * a]).log(), rtol=1e-6)


def test_a_compiled_root_says_that_the_slope_has_fallen():
    jax = pytest.importorskip("jax")
    g = lambda z: jax.numpy.exp(z) - 2.0

    def solve(z):
        settings = {"forward__solver": "picard", "forward__rtol": 1e-3, "forward__max_steps": 300}
        sol = deqcore.root(g, z, **settings, forward__on_failure="ignore")
        return sol.value, sol.status

    value, status = jax.jit(solve)(jax.numpy.full((1, 1), 14.0, jax.numpy.float32))
    assert int(status[0]) == deqcore.Status.STALLED
    assert float(value[0, 0]) > 1.0


def test_neither_the_unit_of_z_nor_that_of_g_matters_at_a_start_of_zero():
    for z_unit, g_unit in [(1e150, 1e-90), (1e-6, 1e6), (1e6, 1e-6)]:
        g = lambda z, u=z_unit, v=g_unit: v * (np.tanh(z / u) + 0.5 * z / u - 1.0)
        sol = deqcore.root(g, np.zeros((1, 1)), forward__rtol=1e-8)
        assert sol.converged.all()
        assert np.tanh(sol.value / z_unit) + 0.5 * sol.value / z_unit == pytest.approx(1.0, rel=1e-6)


def test_the_gradient_is_that_of_the_implicit_function_theorem():
    torch = pytest.importorskip("torch")
    a = torch.tensor([[2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    f = lambda a: (
        deqcore.root(lambda z, a: -4.0 * (z**3 + z.roll(1, 1) - a), 0 * a.detach() + 1, a, forward__rtol=1e-12).value
    )
    assert torch.autograd.gradcheck(f, (a,))
    assert torch.autograd.gradgradcheck(f, (a,))


@pytest.mark.parametrize("strategy", ["broyden-reuse", "phantom", "neumann"])
def test_other_strategies_attach_to_a_root(strategy):
    torch = pytest.importorskip("torch")
    a = torch.full((1, 2), 1.5, dtype=torch.float64, requires_grad=True)
    sol = deqcore.root(
        lambda z, a: z + 0.1 * torch.sin(z) - a, 0 * a.detach(), a, forward__solver="broyden",
        backward__strategy=strategy,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(sol.value.sum(), a)
    truth = 1 / (1 + 0.1 * torch.cos(sol.value.detach()))
    assert (grad - truth).abs().max() < 0.05


def test_jax_traces_it():
    jax = pytest.importorskip("jax")
    solved = jax.jit(
        jax.value_and_grad(
            lambda a: deqcore.root(
                lambda z, a: a - z * z, jax.numpy.ones((1, 1)), a, forward__options={"escalate": False}
            ).value.sum()
        )
    )
    value, grad = solved(jax.numpy.full((1, 1), 2.0))
    assert abs(float(value) - 2**0.5) < 1e-3
    assert abs(float(grad[0, 0]) - 0.5 / 2**0.5) < 1e-3


def test_trees_and_whole_states(be):
    z0 = {"a": number(be, np.ones((2, 3))), "b": number(be, np.ones((2, 1)))}
    g = lambda z: {"a": z["a"] ** 2 - 2.0, "b": z["b"] - be.xp.sum(z["a"], axis=1)[:, None]}
    for batch in (True, False):
        sol = deqcore.root(g, z0, forward__batch=batch)
        assert np.abs(be.to_numpy(sol.value["b"]) - 3 * 2**0.5).max() < 1e-6


def test_integers_and_flags_are_carried_along(be):
    """z² = a n, where n is a count in the state; what g returns for it is ignored."""
    a, n = np.array([[2.0], [3.0]]), np.array([3, 4])
    z0 = {"a": number(be, 3 * np.ones((2, 1))), "n": be.asarray(n), "on": be.asarray(np.array([True, False]))}
    g = lambda z, a: {"a": z["a"] ** 2 - a * be.cast(z["n"], a)[:, None], "n": -z["n"], "on": z["on"]}
    sol = deqcore.root(g, z0, number(be, a), forward__rtol=1e-6)
    assert sol.converged.all()
    assert be.to_numpy(sol.value["n"]).tolist() == [3, 4]
    assert be.to_numpy(sol.value["on"]).tolist() == [True, False]
    assert np.allclose(be.to_numpy(sol.value["a"]), np.sqrt(a * n[:, None]), rtol=1e-4)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("reversible", {"steps": 2}), ("looped", {"depth": 2, "measure": True}), ("unrolled", {"steps": 1})],
)
def test_a_strategy_of_fixed_steps_reports_the_norm_of_g(be, strategy, options):
    a = np.array([[2.0, 3.0], [0.5, 7.0]])
    settings = {"backward__strategy": strategy, "backward__options": options, "forward__on_failure": "ignore"}
    sol = deqcore.root(lambda z: -30.0 * (z * z + z - number(be, a)), number(be, a), **settings)
    z = be.to_numpy(be.detach(sol.value))
    truth = np.linalg.norm(30.0 * (z * z + z - a), axis=1)
    assert truth.min() > 1e-3
    assert np.allclose(be.to_numpy(sol.residual), truth, rtol=1e-6)
    assert np.allclose(np.linalg.norm(be.to_numpy(sol.fz), axis=1), truth, rtol=1e-6)


def test_a_start_at_the_root_converges_at_once(be):
    sol = deqcore.root(lambda z: z - 1.0, number(be, np.ones((1, 2))))
    assert sol.converged.all()
    assert int(sol.steps[0]) == 0


def test_as_many_equations_as_unknowns_are_needed(be):
    with pytest.raises(ProblemError, match=r"as many equations as unknowns.*\(1, 3\).*got \(1, 2\)"):
        deqcore.root(lambda z: z[:, :2], number(be, np.ones((1, 3))))
    with pytest.raises(ProblemError, match="as many equations as unknowns"):
        deqcore.root(lambda z: (z, z), number(be, np.ones((1, 3))))


def test_compaction_is_refused(be):
    with pytest.raises(ConfigError, match=r"forward.compact must be false"):
        deqcore.root(lambda z: z - 1.0, number(be, np.ones((1, 3))), forward__compact=True)


def test_a_singular_jacobian_ends_with_an_honest_status(be):
    """z² has a double root, z₀ + z₁ = 1 twice a line of them, and z² + 1 none."""
    quiet = {"forward__on_failure": "ignore", "forward__max_steps": 100}
    double = deqcore.root(lambda z: z * z, number(be, np.ones((1, 1))), **quiet)
    assert double.converged.all()
    assert np.abs(be.to_numpy(double.value)).max() < 1e-3
    line = deqcore.root(
        lambda z: be.xp.zeros_like(z) + be.xp.sum(z, axis=1)[:, None] - 1.0, 0 * number(be, np.ones((1, 2))), **quiet
    )
    assert abs(be.to_numpy(line.value).sum() - 1.0) < 1e-6
    none = deqcore.root(lambda z: z * z + 1.0, number(be, np.ones((2, 1))), **quiet)
    assert not none.converged.any()
    assert (be.to_numpy(none.residual) > 0.9).all()


def test_a_singular_jacobian_warns_in_the_backward_pass():
    torch = pytest.importorskip("torch")
    a = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    sol = deqcore.root(lambda z, a: z.sum(1, keepdim=True) - 1.0 + 0 * z - a, torch.zeros(1, 2, dtype=torch.float64), a)
    with pytest.warns(ConvergenceWarning, match="adjoint"):
        sol.value[0, 0].backward()
