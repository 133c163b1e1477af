"""Facts that the tests of other libraries state about fixed points, against deqcore's solvers and gradients.

The problems are those of the fixed-point, Anderson and implicit-differentiation tests of jaxopt, the fixed-point tests
of optimistix, and the equilibrium tests of xitorch; each case names its own. Where a test there compares with finite
differences or looks at a residual, the truth here is a closed form, NumPy or SciPy. No code is theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.linalg import block_diag
from scipy.optimize import fsolve
from scipy.special import lambertw

import deqcore

pytestmark = pytest.mark.usefixtures("quick_compiles")

SOLVERS = ("picard", "anderson", "broyden", "newton-krylov", "auto")
COMPILED = ("jaxopt cos", "jaxopt affine", "optimistix exponential")  # in JAX, where each solve is a program to compile
TIGHT = {"forward__batch": False, "forward__rtol": 1e-10, "forward__atol": 1e-10, "forward__max_steps": 300}
RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Fact:
    """A problem and its solution.

    Attributes:
        source: the test that states it.
        f: `f(xp, z, *args)`.
        z0: initial iterate, a tree of NumPy arrays.
        args: NumPy arrays.
        solution: the fixed point, a tree like z0.
        gradients: of the sum of the solution, for each argument; None where it is not checked.
        not_by: solvers that do not reach it.
        another: solvers that may reach another fixed point.
        settings: in addition to `TIGHT`.
        atol: to which the solution holds.
    """

    source: str
    f: Callable[..., Any]
    z0: Any
    args: tuple[Any, ...]
    solution: Any
    gradients: tuple[Any, ...] | None = None
    not_by: tuple[str, ...] = ()
    another: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    atol: float = 1e-7


def cosine():
    """At the second solution f' = −1, so plain iteration creeps."""
    theta = np.array([0.0, np.pi / 2])
    z = np.array([0.7390851332151607, np.pi / 2])  # the second is cos(π/2) + π/2
    slope = 1 / (1 + np.sin(z))
    start = np.array([0.3, np.pi / 4])
    return Fact("jaxopt cos", lambda xp, z, t: xp.cos(z) + t, start, (theta,), z, (slope,), not_by=("picard",))


def geometric():
    rates = np.array([0.9, 0.99, 0.999])
    start = np.array([1.0, 0.4, -0.2])
    slow = {"forward__rtol": 1e-12, "forward__atol": 1e-5, "forward__max_steps": 8000, "forward__patience": 8000}
    return Fact(
        "jaxopt geometric decay", lambda xp, z, r: r * z, start, (rates,), 0 * start, settings=slow, atol=1.1e-2
    )


def trees():
    """Cubic convergence to 0, and a leaf that changes its sign in each plain step; z = 1.114 is a fixed point too."""
    start = {
        "sin": np.array([0.6, 0.0, -0.1]),
        "rest": [np.array([[0.7], [0.5]]), np.array([[-1.0, 0.0, 2.0, -0.4]]) / 3],
    }

    def f(xp, z):
        cubic, sign = z["rest"]
        return {"sin": xp.sin(z["sin"]) * z["sin"] ** 2, "rest": [cubic**3, -sign]}

    zero = {"sin": np.zeros(3), "rest": [np.zeros((2, 1)), np.zeros((1, 4))]}
    return Fact("jaxopt trees", f, start, (), zero, not_by=("picard",), another=("newton-krylov",), atol=1e-4)


def flat():
    theta = np.array([0.05, 0.2])
    zero = np.zeros(2)
    return Fact("jaxopt flat landscape", lambda xp, z, t: t * z, np.array([1.0, -0.5]), (theta,), zero, (zero,))


def affine():
    m = RNG.uniform(-1.0, 1.0, (40, 40))
    m = m + m.T
    m = m / (2 * np.abs(np.linalg.eigvalsh(m)).max())
    b = RNG.uniform(size=40)
    inverse = np.linalg.inv(np.eye(40) - m)
    z, u = inverse @ b, inverse.T @ np.ones(40)
    return Fact("jaxopt affine", lambda xp, z, m, b: m @ z + b, np.zeros(40), (m, b), z, (np.outer(u, z), u))


def rotation():
    """No contraction: plain iteration turns for ever. A solve in at most 14 directions ends in the centre."""
    angles = np.pi / np.array([2, 3, 4, 5, 6, 1.27, 1.73])
    turn = block_diag(*[[[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]] for a in angles])
    centre = np.arange(1.0, 15.0)
    return Fact(
        "jaxopt rotation",
        lambda xp, z, m, c: m @ (z - c) + c,
        RNG.uniform(size=14),
        (turn, centre),
        centre,
        not_by=("picard",),
        settings={"forward__options": {}},
        atol=1e-6,
    )


def scalar():
    return Fact("jaxopt scalars", lambda xp, z: 0.5 * z + 0.5, np.zeros(1), (), np.ones(1))


def exponential():
    omega = float(lambertw(1.0).real)
    start = ({"a": np.full((3, 2, 4), 0.5)}, np.full(4, 0.5))
    z = ({"a": np.full((3, 2, 4), omega)}, np.full(4, omega))
    slope = np.array(-28 * omega**2 / (1 + omega))  # 28 equal numbers, c = 1

    def f(xp, z, c):
        return {"a": xp.exp(-c * z[0]["a"])}, xp.exp(-c * z[1])

    return Fact("optimistix exponential", f, start, (np.array(1.0),), z, (slope,))


def network():
    """A tenth of a two-layer perceptron with softplus; the truth is a plain loop of NumPy."""
    w1, w2 = RNG.uniform(-0.5, 0.5, (8, 6)), RNG.uniform(-0.5, 0.5, (6, 8))
    b1, b2 = RNG.uniform(-0.5, 0.5, 8), RNG.uniform(-0.5, 0.5, 6)

    def f(xp, z, w1, b1, w2, b2):
        return 0.1 * (w2 @ xp.log1p(xp.exp(w1 @ z + b1)) + b2)

    z = np.zeros(6)
    for _ in range(200):
        z = f(np, z, w1, b1, w2, b2)
    hidden = w1 @ z + b1
    jacobian = 0.1 * w2 @ np.diag(1 / (1 + np.exp(-hidden))) @ w1
    u = np.linalg.solve((np.eye(6) - jacobian).T, np.ones(6))
    back = 0.1 * (w2.T @ u) / (1 + np.exp(-hidden))
    gradients = (np.outer(back, z), back, 0.1 * np.outer(u, np.log1p(np.exp(hidden))), 0.1 * u)
    return Fact("optimistix network", f, np.full(6, 0.5), (w1, b1, w2, b2), z, gradients)


def heat():
    """A Crank–Nicolson step of y' = (1 − y) y, number by number: a root of y²/2 + y/2 = c."""
    y0 = np.linspace(-1, 1, 30) ** 2
    f0 = (1 - y0) * y0
    z = (np.sqrt(1 + 8 * (y0 + 0.5 * f0)) - 1) / 2
    return Fact(
        "optimistix heat", lambda xp, z, y0, f0: y0 + 0.5 * ((1 - z) * z + f0), np.ones(30), (y0, f0), z, atol=1e-6
    )


def midpoint(space):
    """An implicit midpoint step of y' = M y, whose y₁ is Cayley's transform of M times y₀."""
    m, y0, dt = RNG.standard_normal((6, 6)), RNG.uniform(size=6), 1 / 16
    y1 = np.linalg.solve(np.eye(6) - dt / 2 * m, (np.eye(6) + dt / 2 * m) @ y0)
    f, z = {
        "y": (lambda xp, z, m, y0: y0 + dt * (m @ (0.5 * (y0 + z))), y1),
        "f": (lambda xp, z, m, y0: m @ (y0 + 0.5 * dt * z), (y1 - y0) / dt),
        "k": (lambda xp, z, m, y0: dt * (m @ (y0 + 0.5 * z)), y1 - y0),
    }[space]
    return Fact(f"optimistix midpoint {space}", f, np.full(6, 0.5), (m, y0), z)


def robertson():
    """An implicit midpoint step of Robertson's stiff reaction; the truth is a root that SciPy finds."""
    dt = 1e-8
    rates, y0 = np.array([0.04, 3e7, 1e4]), np.array([1.0, 0.3, 0.2])

    def f(xp, z, k, y0):
        y = 0.5 * (y0 + z)
        first = -k[0] * y[0] + k[2] * y[1] * y[2]
        last = k[1] * y[1] ** 2
        return y0 + dt * xp.stack([first, -first - last, last])

    z = fsolve(lambda z: f(np, z, rates, y0) - z, y0, xtol=1e-13)
    return Fact("optimistix Robertson", f, np.ones(3), (rates, y0), z)


FACTS = [
    *(make() for make in (cosine, geometric, trees, flat, affine, rotation, scalar)),
    *(make() for make in (exponential, network, heat, robertson)),
    *(midpoint(space) for space in "yfk"),
]
NAMES = [fact.source for fact in FACTS]


def placed(backend, tree):
    leaves, structure = backend.flatten(tree)
    return backend.unflatten(structure, [backend.asarray(leaf) for leaf in leaves])


def numbers(backend, tree):
    return np.concatenate([np.zeros(0), *(backend.to_numpy(leaf).ravel() for leaf in backend.flatten(tree)[0])])


def settings(fact, solver):
    extra = {"anderson": {"forward__options": {"history_size": 15}}} if "rotation" in fact.source else {}
    return TIGHT | fact.settings | {"forward__options": {}} | extra.get(solver, {}) | {"forward__solver": solver}


def pairs():
    for fact in FACTS:
        for solver in SOLVERS:
            yield pytest.param(fact, solver, id=f"{fact.source}-{solver}")


@pytest.mark.parametrize(("fact", "solver"), list(pairs()))
def test_every_solver_finds_the_stated_solution(every, fact, solver):
    if every.name == "jax" and (solver != "anderson" or fact.source not in COMPILED):
        pytest.skip("the solvers are the same code in JAX: three programs stand for all")
    args = placed(every, fact.args)
    options = settings(fact, solver) | {"forward__on_failure": "ignore", "backward__strategy": "jacobian-free"}
    f = lambda z: fact.f(every.xp, z, *args)
    sol = deqcore.fixed_point(f, placed(every, fact.z0), **options)
    reached = bool(np.all(every.to_numpy(sol.converged)))
    assert reached is (solver not in fact.not_by)
    if reached and solver in fact.another:
        z = numbers(every, sol.value)
        assert np.allclose(numbers(every, f(sol.value)), z, rtol=1e-6, atol=1e-8)
    elif reached:
        wanted = np.concatenate([np.zeros(0), *(leaf.ravel() for leaf in _leaves(every, fact.solution))])
        assert np.allclose(numbers(every, sol.value), wanted, rtol=1e-6, atol=fact.atol)


def _leaves(backend, tree):
    return [backend.to_numpy(leaf) for leaf in backend.flatten(placed(backend, tree))[0]]


@pytest.mark.parametrize("fact", [fact for fact in FACTS if fact.gradients is not None], ids=lambda fact: fact.source)
def test_the_gradient_is_that_of_the_closed_form(every, fact):
    if every.name == "jax" and fact.source not in COMPILED:
        pytest.skip("three programs stand for all")
    z0 = placed(every, fact.z0)
    leaves, structure = every.flatten(z0)
    ones = every.unflatten(structure, [every.xp.ones_like(leaf) for leaf in leaves])
    options = settings(fact, "anderson") | {"backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-9}}
    f = lambda z, *a: fact.f(every.xp, z, *a)
    _, found = deqcore.vjp(f, z0, *placed(every, fact.args), cotangent=ones, **options)
    for gradient, wanted in zip(found, fact.gradients, strict=True):
        assert np.allclose(every.to_numpy(gradient), wanted, rtol=1e-5, atol=1e-6)


def test_aux_of_the_last_evaluation_is_kept(every):
    """Jaxopt `has_aux`: a chaotic map beside the solve does not disturb it."""
    y = every.asarray(np.array([0.6]))
    f = lambda z, y: (every.xp.cos(z), 3.95 * y * (1 - y))
    sol = deqcore.fixed_point(f, every.asarray(np.ones(1)), y, has_aux=True, **TIGHT)
    assert every.to_numpy(sol.value) == pytest.approx(0.7390851332151607)
    assert every.to_numpy(every.detach(sol.aux)) == pytest.approx(3.95 * 0.6 * 0.4)


def ridge(xp, regularisation, x, y):
    n, m = x.shape
    return xp.linalg.solve(x.T @ x + regularisation * n * xp.eye(m, dtype=x.dtype), x.T @ y)


def ridge_data():
    x, y = RNG.standard_normal((10, 3)), RNG.standard_normal(10)
    regularised = x.T @ x + 5.0 * 10 * np.eye(3)
    w = np.linalg.solve(regularised, x.T @ y)
    slope = -10 * np.linalg.solve(regularised, w)
    return x, y, w, slope


@pytest.mark.parametrize("has_aux", [False, True])
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_a_solver_of_ones_own_gets_the_derivative_of_ridge_regression(name, has_aux):
    """Jaxopt `custom_root`: dw/dλ of a closed-form solver, from the optimality condition alone."""
    framework = pytest.importorskip(name)
    x, y, w, slope = ridge_data()
    condition = lambda w, lam, x, y: x.T @ (x @ w - y) / 10 + lam * w
    options = {"forward__batch": False, "forward__rtol": 1e-5, "backward__options": {"rtol": 1e-9}}
    if name == "torch":
        tensors = [framework.as_tensor(a) for a in (x, y)]
        solver = lambda z0, lam, x, y: (ridge(framework, lam, x, y), 3) if has_aux else ridge(framework, lam, x, y)
        solve = deqcore.custom_root(condition, has_aux=has_aux, **options)(solver)
        lam = framework.tensor(5.0, dtype=framework.float64, requires_grad=True)
        found = solve(framework.zeros(3, dtype=framework.float64), lam, *tensors)
        found = found[0] if has_aux else found
        rows = [framework.autograd.grad(found[i], lam, retain_graph=True)[0] for i in range(3)]
        assert np.allclose(found.detach().numpy(), w)
        assert np.allclose(framework.stack(rows).numpy(), slope, rtol=1e-6)
        return
    jnp = framework.numpy
    with framework.enable_x64(True):
        solver = lambda z0, lam, x, y: (ridge(jnp, lam, x, y), 3) if has_aux else ridge(jnp, lam, x, y)
        solve = deqcore.custom_root(condition, has_aux=has_aux, **options)(solver)

        def value(lam):
            found = solve(jnp.zeros(3), lam, jnp.asarray(x), jnp.asarray(y))
            return found[0] if has_aux else found

        assert np.allclose(value(jnp.asarray(5.0)), w)
        assert np.allclose(framework.jacrev(value)(jnp.asarray(5.0)), slope, rtol=1e-6)


class TestXitorch:
    """Equilibria and roots of σ(2 (A + diag d) z) + 2 b per sample, with first and second derivatives."""

    @pytest.fixture
    def data(self):
        torch = pytest.importorskip("torch")
        generator = torch.Generator().manual_seed(100)
        make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        a, d, b = 0.5 * make(3, 3), 0.5 * make(2, 3), 0.1 * make(2, 3)
        return tuple(value.requires_grad_() for value in (a, d, b)), make(2, 3)

    @staticmethod
    def f(z, a, d, b):
        return (2 * (z @ a.T + d * z)).sigmoid() + 2 * b

    options: ClassVar = {
        "forward__rtol": 1e-12,
        "forward__max_steps": 200,
        "backward__options": {"rtol": 1e-11},
        "backward__strategy": "exact-ift",
    }

    @pytest.mark.parametrize("solver", ["anderson", "broyden", "newton-krylov"])
    def test_equilibria(self, data, solver):
        args, z0 = data
        sol = deqcore.fixed_point(self.f, z0, *args, forward__solver=solver, **self.options)
        wanted = fsolve(
            lambda z: self.f(z0.new_tensor(z).reshape(2, 3), *args).detach().numpy().ravel() - z,
            sol.value.detach().numpy().ravel(),
        )
        assert np.allclose(sol.value.detach().numpy().ravel(), wanted, rtol=1e-9)

    def test_first_and_second_derivatives(self, data):
        from torch.autograd import gradcheck, gradgradcheck

        args, z0 = data
        value = lambda *args: deqcore.fixed_point(self.f, z0, *args, forward__solver="broyden", **self.options).value
        assert gradcheck(value, args)
        assert gradgradcheck(value, args)

    def test_roots(self, data):
        from torch.autograd import gradcheck

        args, z0 = data
        g = lambda z, *args: self.f(z, *args) + z
        value = lambda *args: deqcore.root(g, z0, *args, forward__solver="broyden", **self.options).value
        assert float(g(value(*args), *args).detach().abs().max()) < 1e-9
        assert gradcheck(value, args)
