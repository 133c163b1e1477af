"""A problem in other units has the same solution in these units, whatever its numbers' squares do.

Truth: z = a z + x has z* = x / (1 − a) and, for a cotangent g, dL/dx = g / (1 − a). Norms: `math.hypot`, which scales.
"""

import math
from contextlib import nullcontext

import numpy as np
import pytest

import deqcore
from deqcore.abc.scaling import row_scale
from deqcore.solve.loop import iterate
from deqcore.solvers.anderson import Anderson
from deqcore.solvers.broyden import Broyden
from deqcore.types import StoppingCriteria

A = np.array([0.5, 0.3, -0.4, 0.1, 0.45])
X = np.array([[1.0, -2.0, 0.5, 3.0, 1.5], [-1.0, 0.25, 2.0, -0.5, 4.0]])
G = np.array([[0.5, 1.0, -1.0, 2.0, 0.25], [1.0, -3.0, 0.5, 1.5, -0.75]])

CASES = [
    ("float32", 1e-19),
    ("float32", 1e-21),
    ("float32", 1e-25),
    ("float32", 1e20),
    ("float32", 1e25),
    ("bfloat16", 1e-23),
    ("bfloat16", 1e20),
    ("float64", 1e-170),
    ("float64", 1e-200),
    ("float64", 1e200),
]
CLOSE = {"float32": 1e-3, "bfloat16": 6e-2, "float64": 1e-6}
SOLVERS = [
    ("picard", {}), ("anderson", {}), ("anderson", {"mixing": 0.9}), ("broyden", {}), ("broyden", {"history_size": 3}),
           ("broyden", {"max_residual_growth": 2.0}), ("newton-krylov", {})]  # fmt: skip
EXACT = ["exact-ift", "broyden-reuse"]


def arrays(name, dtype, *given):
    if name == "torch":
        torch = pytest.importorskip("torch")
        return [torch.tensor(a).to(getattr(torch, dtype)) for a in given]
    if name == "jax":
        jnp = pytest.importorskip("jax.numpy")
        return [jnp.asarray(a, dtype) for a in given]
    return [np.asarray(a, dtype) for a in given]


def host(name, x):
    return np.asarray(deqcore.get_backend(backend=name).to_numpy(x), np.float64)


def precise(name, dtype):
    """Double precision is a switch in JAX; all else runs without it."""
    if name != "jax" or dtype != "float64":
        return nullcontext()
    import jax

    return jax.enable_x64(True)


def solved(name, dtype, s, solver, options, strategy="exact-ift", z0=0.0):
    """z* and dL/dx in units of s and of the cotangent, and the solution."""
    a, x, g, start = arrays(name, dtype, A, X * s, G, X * s * z0)
    settings = {"forward__solver": solver, "forward__options": options, "backward__strategy": strategy}
    if name == "jax":  # one program for both
        import jax

        def value(x):
            sol = deqcore.fixed_point(lambda z, x: a * z + x, start, x, **settings)
            return sol.value, sol

        value, vjp, sol = jax.vjp(value, x, has_aux=True)
        return host(name, value) / s, host(name, vjp(g)[0]), sol
    sol = deqcore.fixed_point(lambda z: a * z + x, start, **settings)
    _, (dx,) = deqcore.vjp(lambda z, x: a * z + x, start, x, cotangent=g, **settings)
    return host(name, sol.value) / s, host(name, dx), sol


def check(name, dtype, s, solver, options, strategy="exact-ift"):
    value, dx, sol = solved(name, dtype, s, solver, options, strategy)
    assert bool(sol.converged.all())
    assert np.linalg.norm(value - X / (1 - A)) <= CLOSE[dtype] * np.linalg.norm(X / (1 - A))
    if strategy == "exact-ift":
        assert np.linalg.norm(dx - G / (1 - A)) <= CLOSE[dtype] * np.linalg.norm(G / (1 - A))
    else:
        assert np.linalg.norm(dx - G / (1 - A)) <= 0.1 * np.linalg.norm(G / (1 - A))
    assert float(sol.residual.max()) > 0.0 or solver == "newton-krylov"
    return sol


@pytest.mark.parametrize(("solver", "options"), SOLVERS, ids=str)
@pytest.mark.parametrize(("dtype", "s"), CASES)
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_states_of_any_size(name, dtype, s, solver, options):
    if name == "numpy" and (dtype == "bfloat16" or solver == "newton-krylov"):
        pytest.skip("no such dtype, or products by differences")
    check(name, dtype, s, solver, options)


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
@pytest.mark.parametrize(
    ("dtype", "s"), [("float32", 1e-25), ("float32", 1e25), ("float64", 1e-200), ("float64", 1e200)]
)
def test_torch_without_compiled_code(monkeypatch, dtype, s, solver):
    pytest.importorskip("torch")
    from deqcore_torch import compiled

    monkeypatch.setattr(compiled, "loaded", lambda kind: None)
    check("torch", dtype, s, solver, {})


@pytest.mark.parametrize(
    ("dtype", "s", "solver"),
    [
        ("float32", 1e-21, "broyden"),
        ("float32", 1e-25, "anderson"),
        ("float32", 1e25, "broyden"),
        ("float32", 1e20, "picard"),
        ("float32", 1e-25, "newton-krylov"),
        ("bfloat16", 1e-23, "broyden"),
        ("float64", 1e-170, "broyden"),
        ("float64", 1e200, "anderson"),
    ],
)
def test_jax_without_double_precision(dtype, s, solver):
    pytest.importorskip("jax")
    with precise("jax", dtype):
        check("jax", dtype, s, solver, {})


def test_jax_compiled_and_over_further_axes():
    jax = pytest.importorskip("jax")
    a, x = arrays("jax", "float32", A, X * 1e-25)

    def loss(x, g):
        return (deqcore.fixed_point(lambda z, x: a * z + x, 0 * x, x).value * g).sum()

    (g,) = arrays("jax", "float32", G * 1e20)
    huge, small = arrays("jax", "float32", X * 1e20, G * 1e-20)
    both = jax.jit(jax.vmap(jax.grad(loss)))(jax.numpy.stack([x, huge]), jax.numpy.stack([g, small]))
    for found, s in zip(np.asarray(both, np.float64), (1e20, 1e-20), strict=True):
        assert np.allclose(found / s, G / (1 - A), rtol=1e-3)


@pytest.mark.parametrize("strategy", EXACT)
@pytest.mark.parametrize(("name", "dtype", "s"), [
    ("torch", "float32", 1e-25), ("torch", "float32", 1e25), ("torch", "float64", 1e-200), ("torch", "float64", 1e200),
    ("jax", "float32", 1e-25), ("jax", "float32", 1e25), ("numpy", "float64", 1e-200), ("numpy", "float32", 1e25),
])  # fmt: skip
def test_cotangents_of_any_size(name, dtype, s, strategy):
    a, x, g = arrays(name, dtype, A, X, G * s)
    _, (dx,) = deqcore.vjp(lambda z, x: a * z + x, 0 * x, x, cotangent=g, backward__strategy=strategy)
    bound = CLOSE[dtype] if strategy == "exact-ift" else 0.1
    assert np.linalg.norm(host(name, dx) / s - G / (1 - A)) <= bound * np.linalg.norm(G / (1 - A))


@pytest.mark.parametrize("inner", ["broyden", "anderson"])
def test_a_solver_for_the_adjoint_equation(inner):
    torch = pytest.importorskip("torch")
    a, x, g = arrays("torch", "float32", A, X, G * 1e-25)
    options = {"solver": inner}
    x.requires_grad_()
    sol = deqcore.fixed_point(lambda z: a * z + x, torch.zeros(2, 5), backward__options=options)
    sol.value.backward(g)
    assert np.allclose(host("torch", x.grad) / 1e-25, G / (1 - A), rtol=1e-3)
    assert int(sol.backward.vjps.max()) > 1


@pytest.mark.parametrize("solver", ["broyden", "anderson", "picard"])
@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_batch_mates_of_other_sizes_change_no_bit(name, solver):
    rows = np.concatenate([X, X * 1e-25, X * 1e25])
    a, x, alone = arrays(name, "float32", A, rows, X)
    settings = {"forward__solver": solver, "forward__max_steps": 60, "forward__rtol": 1e-5}
    together = deqcore.fixed_point(lambda z: a * z + x, 0 * x, **settings)
    apart = deqcore.fixed_point(lambda z: a * z + alone, 0 * alone, **settings)
    value, steps = host(name, together.value), host(name, together.steps)
    assert np.array_equal(value[:2], host(name, apart.value)) or name == "jax"  # XLA adds in another order
    assert np.allclose(value, rows / (1 - A), rtol=1e-3, atol=0)
    assert list(steps) == list(host(name, apart.steps)) * 3


@pytest.mark.parametrize(
    "solver", [Broyden(), Broyden(history_size=3), Broyden(max_residual_growth=2.0), Anderson(), Anderson(mixing=0.8)]
)
@pytest.mark.parametrize(("name", "k"), [("numpy", 664), ("torch", 664), ("torch", 83)])
def test_powers_of_two_change_no_bit(name, k, solver):
    """The whole state is that of the problem in units of 1, which needs no scale: so it has none to be hidden by."""
    dtype = "float64" if k > 100 else "float32"
    w = 0.7 * np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    weights, x = arrays(name, dtype, w, X)
    backend = deqcore.get_backend(backend=name)
    found = []
    for s in (1.0, 2.0**-k, 2.0**k):
        f = lambda z, s=s: s * backend.xp.tanh((z / s) @ weights) + s * x
        with backend.errstate(), nothing(name):
            found.append(iterate(backend, solver, f, 0 * x, StoppingCriteria(1e-9 if k > 100 else 1e-5)))
    plain = found[0]
    assert plain.carry.state.unit is None
    for other, s in zip(found[1:], (2.0**-k, 2.0**k), strict=True):
        assert np.array_equal(host(name, other.z) / s, host(name, plain.z))
        assert np.allclose(host(name, other.residual) / s, host(name, plain.residual), rtol=1e-6, atol=0)
        assert list(host(name, other.steps)) == list(host(name, plain.steps))
        v = x * 3
        apply = [solver.inverse_jacobian(backend, each.carry.state).apply_transpose for each in (plain, other)]
        assert np.array_equal(host(name, apply[0](v)), host(name, apply[1](v)))


def nothing(name):
    if name != "torch":
        return nullcontext()
    import torch

    return torch.no_grad()


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "strict"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_norms(name, dtype):
    from deqcore.testing import strict

    strict.register()
    wide = np.random.default_rng(1).uniform(-35, 35, (6, 33)) if dtype == "float32" else np.linspace(-290, 290, 198)
    rows = (10.0 ** np.reshape(wide, (6, 33))).astype(dtype)
    rows = np.concatenate(
        [rows, np.zeros((1, 33), dtype), np.full((1, 33), 1e-25 if dtype == "float32" else 1e-200, dtype)]
    )
    with precise(name, dtype):
        backend = deqcore.get_backend(backend=name)
        with backend.errstate():
            found = np.asarray(backend.to_numpy(backend.norm(backend.asarray(rows))), np.float64)
    expected = [math.hypot(*map(float, row)) for row in rows]
    assert np.allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "low", "high"), [("float32", -36, 36), ("float64", -290, 290)])
def test_norms_of_jax_on_accelerators(dtype, low, high):
    """Three sums in one pass, instead of a second pass that the host would have to decide on."""
    pytest.importorskip("jax")
    from deqcore_jax.backend import _norm_by_ranges

    rows = 10.0 ** np.linspace(low, high, 64)[:, None] * np.array([3.0, 4.0])
    with precise("jax", dtype):
        import jax.numpy as jnp

        found = np.asarray(_norm_by_ranges(jnp.asarray(rows, dtype)), np.float64)
        ends = np.asarray(_norm_by_ranges(jnp.asarray([[0.0, 0.0], [np.inf, 1.0], [np.nan, 1.0]], dtype)))
    assert np.allclose(found, 5.0 * 10.0 ** np.linspace(low, high, 64), rtol=1e-5, atol=0)
    assert ends[0] == 0.0
    assert ends[1] == np.inf
    assert np.isnan(ends[2])


@pytest.mark.parametrize("solver", ["broyden", "anderson", "picard"])
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_ordinary_numbers_pay_nothing(monkeypatch, name, solver):
    """No row is looked at twice and none is scaled: the passes over `(batch, n)` are what they were."""
    backend = deqcore.get_backend(backend=name)
    monkeypatch.setattr(type(backend.numbers), "power_of_two", lambda *_: pytest.fail("a scale, or a second pass"))
    a, x, g = arrays(name, "float32", A, X, G)
    settings = {"forward__solver": solver, "backward__strategy": "neumann"}  # GMRES ends with a residual of rounding
    deqcore.vjp(lambda z, x: a * z + x, 0 * x, x, cotangent=g, **settings)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_a_norm_in_a_wider_dtype_hides_no_vector_near_the_ends_of_its_range(size):
    """A backend may sum squares of float32 in float64, whose range is not that of products in float32."""
    backend, v = deqcore.get_backend(backend="numpy"), np.full((1, 4), size, np.float32)
    scale = row_scale(backend, np.linalg.norm(v.astype(np.float64), axis=1), v)
    assert scale is not None
    assert np.abs(v / scale).max() == pytest.approx(1.0, rel=1.0)
    assert row_scale(backend, np.ones(1), v) is None


@pytest.mark.parametrize("strategy", ["phantom", "unrolled", "reversible", "looped"])
@pytest.mark.parametrize(("name", "dtype", "k"), [("numpy", "float64", 664), ("torch", "float32", 83)])
def test_rows_of_a_cotangent_keep_their_size(name, dtype, k, strategy):
    """The gradient of 0.5 z + x is the cotangent times a number that all rows share."""
    be = deqcore.get_backend(backend=name)
    g = np.array([[2.0**k], [2.0**-k], [1.0], [0.0]])
    x, cotangent = be.asarray(np.ones((4, 1)), dtype=dtype), be.asarray(g, dtype=dtype)
    options = {"depth": 4} if strategy == "looped" else {"steps": 4}
    settings = {"backward__strategy": strategy, "backward__options": options, "forward__on_failure": "ignore"}
    _, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, 0 * x, x, cotangent=cotangent, **settings)
    found = be.to_numpy(dx)[:3] / g[:3]
    assert found.min() > 0.5
    assert np.allclose(found, found[2], rtol=1e-5)


def test_unrolled_steps():
    torch = pytest.importorskip("torch")
    for solver in ("broyden", "anderson", "picard"):
        found = []
        for s in (1.0, 2.0**-83, 2.0**83):
            a, x, g = arrays("torch", "float32", A, X * s, G)
            x.requires_grad_()
            value = deqcore.fixed_point(
                lambda z, a=a, x=x: a * z + x, torch.zeros(2, 5), forward__solver=solver, backward__strategy="unrolled",
                backward__options={"steps": 5},
            ).value  # fmt: skip
            value.backward(g)
            found.append((host("torch", value.detach()) / s, host("torch", x.grad)))
        for value, dx in found[1:]:
            assert np.allclose(value, found[0][0], rtol=1e-5)
            assert np.allclose(dx, found[0][1], rtol=1e-4)


def test_a_start_of_ordinary_size_with_a_tiny_solution():
    """The scale is that of the first residual; what the solve comes to later is still measured, not taken for 0."""
    for name in ("numpy", "torch", "jax"):
        a, x, one = arrays(name, "float32", np.full(3, 0.5), np.full((1, 3), 1e-25), np.ones((1, 3)))
        sol = deqcore.fixed_point(lambda z, a=a, x=x: a * z + x, one, forward__solver="picard", forward__max_steps=200)
        assert np.allclose(host(name, sol.value), 2e-25, rtol=1e-3, atol=0)
        assert int(sol.steps.max()) > 80


@pytest.mark.parametrize(("dtype", "k"), [("float32", 83), ("float64", 664)])
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_unrolled_newton_steps_of_a_curved_map(name, dtype, k):
    """f'' of s·f(z/s) is f''/s: products with vectors of length 1 left the range in its derivative, not in f's."""
    if name == "jax" and dtype == "float64":
        pytest.skip("one compiled program is enough")
    backend, w = deqcore.get_backend(backend=name), 0.9 * np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0]
    settings = {"forward__solver": "newton-krylov", "forward__rtol": 1e-6}
    steps = {"backward__strategy": "unrolled", "backward__options": {"steps": 3}}  # before it has converged
    with precise(name, dtype):
        found = []
        (weights,) = arrays(name, dtype, w)
        f = lambda z, x, s: s * backend.xp.tanh((z / s) @ weights) + x  # one f: JAX compiles it once for all s
        for s in (1.0, 2.0**-k, 2.0**k):
            x, g, unit = arrays(name, dtype, X * s, G, np.full((len(X), 1), s))
            z, (dx, _) = deqcore.vjp(f, 0 * x, x, unit, cotangent=g, **settings, **steps)
            found.append((host(name, z) / s, host(name, dx)))
    for z, dx in found[1:]:
        assert np.allclose(z, found[0][0], rtol=1e-5)
        assert np.allclose(dx, found[0][1], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_unrolled_newton_steps_to_an_equilibrium_at_zero(dtype):
    """The residual falls to subnormal numbers, whose inverse is infinite; dz*/dx there is (1 − tanh'(0)/2)^-1 = 2."""
    pytest.importorskip("torch")
    a, start, x, g = arrays("torch", dtype, A, np.full((2, 5), 0.3), 0 * X, G)
    settings = {
        "forward__solver": "newton-krylov",
        "backward__strategy": "unrolled",
        "backward__options": {"steps": 12},
    }
    z, (dx,) = deqcore.vjp(lambda z, x: (a * z).tanh() + x, start, x, cotangent=g, **settings)
    assert np.abs(host("torch", z)).max() < 1e-30
    assert np.allclose(host("torch", dx), G / (1 - A), rtol=1e-4)


@pytest.mark.parametrize("strategy", ["exact-ift", "unrolled"])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_an_argument_in_the_units_of_a_state_and_a_cotangent_of_that_size(every, strategy, scale):
    """z = s (z/2s + sin(x/s)), so that dz/dx = 2 cos(x/s). Its derivative multiplies by s, then divides by s."""
    sin, x = every.xp.sin, every.asarray(np.full((2, 1), scale), dtype="float32")
    _, (dx,) = deqcore.vjp(
        lambda z, x: scale * (0.5 * (z / scale) + sin(x / scale)), 0 * x, x, cotangent=x, forward__max_steps=80,
        forward__solver="picard", forward__rtol=1e-6, backward__strategy=strategy,
        backward__options={"steps": 40} if strategy == "unrolled" else {},
    )  # fmt: skip
    assert every.to_numpy(dx) / scale == pytest.approx(2 * np.cos(1.0), rel=1e-4)
