"""`sol.value` is the point whose residual and status are reported, whatever the strategy, solver and backend.

The truth is the residual that the test computes itself, in NumPy and float64.
"""

import numpy as np
import pytest

import deqcore
from deqcore.errors import StrategyError
from deqcore.types import Status

SOLVERS = ["picard", "anderson", "broyden", "newton-krylov"]
STRATEGIES = ["exact-ift", "broyden-reuse", "jacobian-free", "neumann", "phantom", "unrolled"]
RTOL = 1e-6


@pytest.fixture
def be(every):
    return every


def powell(z, xp):
    """Powell (1970), badly scaled: x₁x₂ = 1e-4 and e^-x₁ + e^-x₂ = 1.0001 as z = z − F(z), which expands by 1e4."""
    a, b = z[:, :1], z[:, 1:]
    return xp.concatenate([z[:, :1] - 1e4 * a * b + 1, z[:, 1:] - xp.exp(-a) - xp.exp(-b) + 1.0001], 1)


def waves(z, xp):
    """Expands by up to 4 near its fixed points."""
    return 3.0 * xp.sin(z) + 0.5 * xp.cos(2 * z)


class Namespace:
    """`concatenate` under its older name."""

    def __init__(self, xp):
        self.xp, self.concatenate = xp, getattr(xp, "concatenate", None) or xp.concat

    def __getattr__(self, name):
        return getattr(self.xp, name)


PROBLEMS = {"powell": (powell, [[0.0, 1.0], [1e-5, 9.0]]), "waves": (waves, [[0.3, 1.0, 2.0], [0.1, 0.0, -2.0]])}


def honest(be, f, value, residual, status, rtol=RTOL):
    z = be.to_numpy(be.detach(value)).astype(float)
    with np.errstate(all="ignore"):
        fz = f(z, Namespace(np))
        true, size = np.linalg.norm(fz - z, axis=1), np.linalg.norm(fz, axis=1)
    reported, status = be.to_numpy(residual), be.to_numpy(status)
    rounding = 1e-13 * (1e4 * np.linalg.norm(z, axis=1) + size)
    known = np.isfinite(reported)
    assert (np.abs(true - reported)[known] <= rounding[known] + 1e-9 * true[known]).all(), (true, reported)
    done = status == int(Status.CONVERGED)
    assert (true[done] <= rtol * size[done] + rounding[done]).all(), (true, status)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_value_has_the_residual_that_is_reported(be, solver, strategy, problem):
    if be.name == "jax" and strategy not in ("exact-ift", "phantom", "unrolled") and solver != "broyden":
        pytest.skip("one compiled path for all strategies without steps")
    f, start = PROBLEMS[problem]
    z0 = be.asarray(np.array(start))
    settings = {"forward__solver": solver, "forward__rtol": RTOL, "backward__strategy": strategy}
    try:
        sol = deqcore.fixed_point(
            lambda z: f(z, Namespace(be.xp)), z0, forward__on_failure="ignore", forward__max_steps=60, **settings
        )
    except StrategyError:
        assert strategy == "broyden-reuse"
        assert solver in ("picard", "newton-krylov")
        return
    honest(be, f, sol.value, sol.residual, sol.status)
    assert np.array_equal(be.to_numpy(be.detach(sol.value)), be.to_numpy(sol.z), equal_nan=True)
    if np.isfinite(be.to_numpy(sol.residual)).all():
        gap = be.to_numpy(sol.fz) - be.to_numpy(sol.z)
        assert np.linalg.norm(gap, axis=1) == pytest.approx(be.to_numpy(sol.residual), rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("strategy", ["exact-ift", "jacobian-free", "phantom", "unrolled"])
def test_vjp_gives_the_same_point(be, strategy):
    x = be.asarray(np.array([[0.1, 0.2], [0.3, -0.4]]))
    f = lambda z, x: 3.0 * be.xp.sin(z) + x
    settings = {
        "forward__solver": "broyden",
        "forward__max_steps": 7,
        "forward__on_failure": "ignore",
        "backward__strategy": strategy,
    }
    sol = deqcore.fixed_point(f, 0 * x + 1, x, **settings)
    value, _ = deqcore.vjp(f, 0 * x + 1, x, cotangent=x, **settings)
    assert np.array_equal(be.to_numpy(value), be.to_numpy(be.detach(sol.value)))


@pytest.mark.parametrize(("strategy", "slope"), [("exact-ift", 1 / 3.0), ("jacobian-free", 1.0), ("phantom", 1 - 2.0)])
def test_the_gradient_is_as_before(be, strategy, slope):
    """f(z) = −2z + x: z* = x/3, and one evaluation has the derivative 1; two undamped steps have 1 − 2."""
    x = be.asarray(np.array([[3.0, 6.0]]))
    options = {"steps": 2, "damping": 1.0} if strategy == "phantom" else {}
    z, (dx,) = deqcore.vjp(
        lambda z, x: x - 2 * z,
        0 * x,
        x,
        cotangent=0 * x + 1,
        forward__solver="broyden",
        forward__rtol=1e-10,
        backward__strategy=strategy,
        backward__options=options,
    )
    assert be.to_numpy(z) == pytest.approx(np.array([[1.0, 2.0]]), rel=1e-8)
    assert be.to_numpy(dx) == pytest.approx(np.full((1, 2), slope), rel=1e-4)


def test_nothing_nan_in_the_steps_reaches_the_value(be):
    """Phantom steps from an unstable solution overflow; the value does not."""
    f = lambda z: z * z * 1e3
    z0 = be.asarray(np.array([[1e-3 * (1 + 1e-9)]]))
    sol = deqcore.fixed_point(
        f,
        z0,
        forward__rtol=1e-6,
        backward__strategy="phantom",
        backward__options={"steps": 60, "damping": 1.0},
        forward__on_failure="ignore",
    )
    assert be.to_numpy(be.detach(sol.value)).tolist() == be.to_numpy(z0).tolist()


def test_a_sample_that_starts_at_nan_returns_its_start(be):
    x = be.asarray(np.array([[1.0], [np.nan]]))
    sol = deqcore.fixed_point(lambda z, x: 0.5 * z + x, 0 * x[:1] + be.asarray(np.zeros((2, 1))), x,
                              forward__on_failure="ignore")  # fmt: skip
    assert be.to_numpy(be.detach(sol.value))[1].tolist() == [0.0]
    assert np.isnan(be.to_numpy(sol.fz)[1]).all()


def test_torch_value_in_all_modes():
    torch = pytest.importorskip("torch")
    x = torch.tensor([[0.1, 0.4]], dtype=torch.float64)
    settings = {"forward__solver": "broyden", "forward__max_steps": 6, "forward__on_failure": "ignore"}

    def solved(x, strategy="exact-ift"):
        return deqcore.fixed_point(
            lambda z, x: 3 * torch.sin(z) + x, 0 * x.detach() + 1, x, backward__strategy=strategy, **settings
        )

    plain = solved(x)
    recorded = solved(x.clone().requires_grad_())
    with torch.no_grad():
        quiet = solved(x)
    for strategy in ("exact-ift", "phantom"):
        value, tangent = torch.func.jvp(
            lambda x, strategy=strategy: solved(x, strategy).value, (x,), (torch.ones_like(x),)
        )
        assert torch.allclose(value, plain.value, rtol=1e-12)  # another history there, which rounds otherwise
        assert torch.isfinite(tangent).all()
        pulled, _ = torch.func.vjp(lambda x, strategy=strategy: solved(x, strategy).value, x)
        assert torch.allclose(pulled, plain.value, rtol=1e-12)
    assert torch.equal(recorded.value, plain.value)
    assert torch.equal(quiet.value, plain.value)


def test_phantom_runs_no_step_where_nothing_is_recorded():
    torch = pytest.importorskip("torch")
    calls = []
    x = torch.ones(1, 2)

    def f(z, x):
        calls.append(1)
        return 0.5 * z + x

    with torch.no_grad():
        sol = deqcore.fixed_point(f, 0 * x, x, backward__strategy="phantom")
    assert len(calls) == int(sol.evaluations.max())


def test_a_jax_solution_is_a_pytree_with_both_points():
    jax = pytest.importorskip("jax")
    sol = jax.jit(lambda x: deqcore.fixed_point(lambda z: 0.5 * z + x, 0 * x))(jax.numpy.ones((1, 2)))
    assert sol.z.tolist() == sol.value.tolist()
    assert sol.fz.shape == (1, 2)
