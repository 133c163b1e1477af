"""`unrolled` takes its steps whatever the value has reached: a derivative may be on its way still.

The truths are closed forms: where a component's value is at its solution from the start, its derivative is still a
series. With the slope s it is (1 − s^k) / (1 − s) after k plain steps.
"""

import warnings
from functools import partial

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConvergenceError, ConvergenceWarning
from deqcore.types import Status

SOLVERS = ["picard", "anderson", "broyden", "newton-krylov"]


@pytest.fixture
def be(every):
    return every


def gradient(be, f, x, solver, steps, component=1, z0=None, **options):
    g = np.zeros(x.shape)
    g[:, component] = 1.0
    z, (dx,) = deqcore.vjp(
        f,
        be.asarray(np.zeros(x.shape) if z0 is None else z0),
        be.asarray(x),
        cotangent=be.asarray(g),
        forward__solver=solver,
        backward__strategy="unrolled",
        backward__options={"steps": steps, **options},
    )
    return be.to_numpy(z), be.to_numpy(dx)


@pytest.mark.parametrize(
    ("solver", "steps"),
    [(solver, steps) for solver in SOLVERS for steps in ((3, 10) if solver == "newton-krylov" else (10, 30, 100))],
)
@pytest.mark.parametrize("moving", [0.0, 1.0], ids=["there at once", "beside one that moves"])
def test_a_derivative_whose_value_is_there_already(be, solver, steps, moving):
    """z₂ = ½ z₂ + ¼ x₂ at x₂ = 0: the value 0 is there at once, its derivative ½ comes geometrically.

    NumPy's nested differences take a second for each step of Newton–Krylov.
    """
    xp = be.xp
    f = lambda z, x: xp.concat([xp.tanh(0.5 * z[:, :1]) + x[:, :1], 0.5 * z[:, 1:] + 0.25 * x[:, 1:]], axis=1)
    _, dx = gradient(be, f, np.array([[moving, 0.0], [0.3 * moving, 0.0]]), solver, steps)
    assert dx[:, 1] == pytest.approx(0.5, abs=2 * 0.5**steps + 1e-9)
    assert dx[:, 0] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_at_the_solution_has_a_derivative(be, solver):
    f = lambda z, x: 0.5 * z + x
    x = np.array([[1.0, -2.0]])
    z, dx = gradient(be, f, x, solver, 40, z0=2 * x)
    assert np.array_equal(z, 2 * x)
    assert dx == pytest.approx(np.array([[0.0, 2.0]]), abs=1e-8)


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
@pytest.mark.parametrize("steps", [25, 80])
def test_an_expanding_f_keeps_value_and_derivative(be, solver, steps):
    """f(z) = A z + x with eigenvalues to −2: z* = (I − A)⁻¹ x, and chord steps keep it."""
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    a = q @ np.diag([-2.0, 0.4, -0.3]) @ q.T
    x = rng.standard_normal((2, 3))
    at = be.asarray(a.T)
    z, dx = gradient(be, lambda z, x: z @ at + x, x, solver, steps)
    inverse = np.linalg.inv(np.eye(3) - a)
    assert z == pytest.approx(x @ inverse.T, rel=1e-8)
    assert dx == pytest.approx(np.tile(inverse.T @ np.eye(3)[1], (2, 1)), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_residual_and_status_are_measured(be, solver):
    f = lambda z, x: be.xp.cos(z) + x
    x = be.asarray(np.array([[0.1, 0.2]]))
    for steps, status in ((1, Status.FIXED_STEPS), (60, Status.CONVERGED)):
        sol = deqcore.fixed_point(
            f,
            0 * x,
            x,
            forward__solver=solver,
            forward__rtol=1e-6,
            backward__strategy="unrolled",
            backward__options={"steps": steps},
        )
        z = be.to_numpy(be.detach(sol.value))
        true = np.linalg.norm(np.cos(z) + be.to_numpy(x) - z, axis=1)
        assert be.to_numpy(sol.residual) == pytest.approx(true, rel=1e-6, abs=1e-15)
        assert Status(int(sol.status[0])) is status
        assert int(sol.steps[0]) == steps
        assert int(sol.evaluations[0]) >= steps + 1
        assert "forward.max_steps" not in sol.summary()
    assert "CONVERGED" in sol.summary()


@pytest.mark.parametrize("strategy", ["unrolled", "reversible", "looped"])
def test_a_sample_that_is_not_finite_fails(be, strategy):
    x = be.asarray(np.array([[0.1, 0.2], [np.nan, 1.0]]))
    solve = partial(
        deqcore.fixed_point, lambda z, x: 0.5 * z + x, be.asarray(np.zeros((2, 2))), x, forward__solver="picard",
        backward__strategy=strategy, backward__verify_every=0,
    )  # fmt: skip
    with pytest.warns(ConvergenceWarning, match="1 of 2 samples NONFINITE"):
        sol = solve()
    assert [Status(int(code)) for code in sol.status] == [Status.FIXED_STEPS, Status.NONFINITE]
    with pytest.raises(ConvergenceError, match="1 of 2 samples NONFINITE"):
        solve(forward__on_failure="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(forward__on_failure="ignore")


def test_the_number_of_evaluations_is_what_it_was():
    torch = pytest.importorskip("torch")
    for solver in ("picard", "anderson", "broyden"):
        calls = []

        def f(z, calls=calls):
            calls.append(1)
            return 0.1 * torch.tanh(z) + 1

        sol = deqcore.fixed_point(
            f,
            torch.zeros(2, 3, dtype=torch.float64),
            forward__solver=solver,
            backward__strategy="unrolled",
            backward__options={"steps": 40},
            backward__verify_every=0,  # looking for coupled rows evaluates f as well, and no count includes it
        )
        assert len(calls) == 41 == int(sol.evaluations[0])


@pytest.mark.parametrize("slope", [-0.5, -3.0])
def test_a_derivative_that_plain_steps_lead_away_is_not_converged(be, slope):
    """z = s z + x has dz/dx = 1 / (1 − s). Without an estimate Newton's method continues with f beyond rounding."""
    if be.name == "jax":
        pytest.skip("the same step, and slow to compile")
    x = be.asarray(np.array([[0.3, 0.7]]))
    sol = deqcore.fixed_point(
        lambda z, x: slope * z + x, 0 * x, x, forward__solver="newton-krylov", backward__strategy="unrolled",
        backward__options={"steps": 60},
    )  # fmt: skip
    np.testing.assert_allclose(be.to_numpy(be.detach(sol.value)), be.to_numpy(x) / (1 - slope), rtol=1e-9)
    expected = Status.CONVERGED if abs(slope) < 1 else Status.FIXED_STEPS
    assert Status(int(sol.status[0])) is expected
