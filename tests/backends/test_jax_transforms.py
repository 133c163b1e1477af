"""JAX: refusals and reports of the backward pass; traces, compilations and loops counted."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.errors import StrategyError
from deqcore.types import Status

jax = pytest.importorskip("jax")
jnp = jax.numpy

N = 3
EXACT = {"forward__rtol": 1e-12, "backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-12}}
PLAIN = {
    **EXACT,
    "forward__solver": "picard",
    "forward__max_steps": 200,
    "backward__options": {"rtol": 1e-12, "solver": "picard", "max_steps": 200},
}
SILENT = {"backward__on_failure": "ignore"}  # where the adjoint_tap is what is tested
APPROXIMATE = ["broyden-reuse", "jacobian-free", "neumann"]


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def data():
    r = np.random.default_rng(0)
    a, da = 0.4 * r.standard_normal((N, N)), r.standard_normal((N, N))
    return [jnp.asarray(x) for x in (a, da, r.standard_normal((2, N)))]


def solve(a, b, **overrides):
    return deqcore.fixed_point(lambda z, a: jnp.tanh(z @ a.T + b), jnp.zeros_like(b), a, **{**EXACT, **overrides})


def scalar(a, **overrides):
    """z* = 1 / (1 − a), so that the k-th derivative is k! (1 − a)^-(k+1)."""
    return deqcore.fixed_point(lambda z, a: a * z + 1.0, jnp.zeros((1, 1)), a, **{**EXACT, **overrides}).value.sum()


@pytest.mark.slow
@pytest.mark.supports("forward mode and second derivatives", backends="jax", strategies="exact-ift")
def test_check_grads_to_second_order_in_both_modes():
    """The parameter is closed over. Plain iteration on both sides compiles fastest."""
    from jax.test_util import check_grads

    def value(a):
        f = lambda z: jnp.tanh(a * z) + 1.0
        return deqcore.fixed_point(f, jnp.zeros((1, 1)), **PLAIN).value.sum()

    check_grads(value, (jnp.asarray(0.4),), order=2, modes=["fwd", "rev"])


@pytest.mark.parametrize("strategy", APPROXIMATE)
@pytest.mark.supports(
    "forward mode and second derivatives", backends="jax", strategies="approximate ones", answer="refused"
)
def test_approximate_strategies_refuse_forward_mode_and_second_derivatives(strategy):
    value = lambda a: scalar(a, backward__strategy=strategy, backward__options={}, forward__rtol=1e-6)
    with pytest.raises(StrategyError, match="exact-ift"):
        jax.jvp(value, (0.4,), (1.0,))
    with pytest.raises(StrategyError, match="exact-ift"):
        jax.grad(jax.grad(value))(0.4)


# -- counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "options", "loops"),
    [
        ("exact-ift", {}, 7),
        ("exact-ift", {"direct": 0}, 4),
        ("exact-ift", {"solver": "picard"}, 4),
        ("broyden-reuse", {"certify": False, "max_relative_error": None, "fallback": "none"}, 2),
        ("jacobian-free", {}, 2),
        ("neumann", {}, 3),
    ],
    ids=str,
)
def test_a_compiled_gradient_has_few_while_loops(data, strategy, options, loops):
    """Two loops solve forward (steps, in stretches that a refused one ends); single rounds take none of their own.

    The small system of GMRES takes one, because unrolled it compiles for seconds. The direct solve, for samples that
    GMRES cannot solve, takes three more: over columns, over refinements and over unknowns.
    """
    a, _, b = data
    settings = {"backward__strategy": strategy, "backward__options": options, "forward__rtol": 1e-6}
    loss = lambda a: solve(a, b, forward__solver="broyden", **settings).value.sum()  # `auto` has the loops of GMRES
    lowered = jax.jit(jax.grad(loss)).lower(a)
    assert lowered.as_text().count("stablehlo.while") == loops


def test_f_is_traced_once_and_tolerances_and_budgets_recompile_nothing(data, caplog):
    a, _, b = data
    calls = []

    def f(z, a):
        calls.append(1)
        return jnp.tanh(z @ a.T + b)

    @jax.jit
    def gradient(a, rtol, steps):
        value = lambda a: deqcore.fixed_point(
            f, jnp.zeros_like(b), a, forward__rtol=rtol, forward__max_steps=steps, backward__strategy="exact-ift"
        ).value.sum()
        return jax.grad(value)(a)

    loose, tight = gradient(a, 1e-1, 50), gradient(a, 1e-10, 40)
    assert not np.allclose(loose, tight, rtol=1e-6)
    assert len(calls) == 1  # once, for the solve and for its derivatives
    assert gradient._cache_size() == 1

    from deqcore_jax import implicit

    def eager(**settings):
        deqcore.fixed_point(lambda z, a: jnp.sin(z @ a.T + b), jnp.zeros_like(b), a, **settings)

    eager(forward__rtol=1e-3)
    compiled = implicit._run._cache_size()
    eager(forward__rtol=1e-5)
    eager(forward__rtol=1e-5, forward__max_steps=7, forward__on_failure="ignore")
    assert implicit._run._cache_size() == compiled


def test_what_f_closes_over_may_change_between_eager_calls():
    """The same function object with other contents gives its new output, and its new gradient."""
    box = {"a": jnp.asarray(0.5)}
    f = lambda z, x: box["a"] * z + x
    one = jnp.ones((1, 1))
    gradient = lambda x: deqcore.fixed_point(f, jnp.zeros((1, 1)), x, **PLAIN).value.sum()
    assert jax.grad(gradient)(one)[0, 0] == pytest.approx(2.0)
    box["a"] = jnp.asarray(0.75)
    assert gradient(one) == pytest.approx(4.0)
    assert jax.grad(gradient)(one)[0, 0] == pytest.approx(4.0)


def test_a_mutated_nnx_module_gives_its_new_output():
    nnx = pytest.importorskip("flax.nnx")

    class Cell(nnx.Module):
        def __init__(self):
            self.a = nnx.Param(jnp.asarray(0.5))

        def __call__(self, z):
            return self.a[...] * z + 1.0

    cell = Cell()
    solved = lambda cell: deqcore.fixed_point(cell, jnp.zeros((1, 1)), **PLAIN).value.sum()
    assert solved(cell) == pytest.approx(2.0)
    assert nnx.grad(solved)(cell)["a"][...] == pytest.approx(4.0)
    cell.a[...] = jnp.asarray(0.75)
    assert solved(cell) == pytest.approx(4.0)
    assert nnx.grad(solved)(cell)["a"][...] == pytest.approx(16.0)


# -- mistakes -----------------------------------------------------------------------------------------------------


def probed(value, batch, g):
    """Gradient with respect to x, and the report of the backward pass."""
    import deqcore_jax.adjoint_tap as probes

    def of(x, adjoint_tap):
        with probes.reporting(adjoint_tap):
            return value(x)

    _, vjp = jax.vjp(of, jnp.zeros((batch, 1)), probes.new(batch))
    dx, figures = vjp(g)
    return dx, probes.read(figures)


def test_bad_cotangents_and_singular_equations_are_reported_per_sample():
    """Samples: a NaN cotangent, a zero one, a singular I − J, a sound one; each harms only itself."""
    a = jnp.asarray([[0.5], [0.5], [1.0], [0.5]])
    value = lambda x: deqcore.fixed_point(lambda z, x: a * z + x, jnp.zeros((4, 1)), x, **EXACT, **SILENT).value
    dx, report = probed(value, 4, jnp.asarray([[jnp.nan], [0.0], [1.0], [1.0]]))
    expected = [Status.NONFINITE, Status.CONVERGED, Status.STALLED, Status.CONVERGED]
    assert report.status.tolist() == expected
    assert jnp.isnan(dx[0, 0])
    assert dx[1:, 0].tolist() == pytest.approx([0.0, 0.0, 2.0])
    assert report.residual[2] == pytest.approx(1.0)


def test_a_truncated_adjoint_says_so(data):
    a, _, b = data
    options = {"backward__options": {"max_steps": 1, "rtol": 1e-10}, "forward__solver": "picard", **SILENT}
    value = lambda x: (
        deqcore.fixed_point(
            lambda z, x: z @ a.T + x @ jnp.ones((1, N)), jnp.zeros_like(b), x, **{**EXACT, **options}
        ).value
    )
    _, report = probed(value, 2, b)
    g = np.asarray(b)
    jg = g - g @ np.asarray(a)  # (I − Jᵀ) g, row by row
    best = [np.linalg.norm(g[i] - jg[i] * (jg[i] @ g[i]) / (jg[i] @ jg[i])) / np.linalg.norm(g[i]) for i in range(2)]
    assert report.residual.tolist() == pytest.approx(best, rel=1e-6)
    assert report.status.tolist() == [Status.MAX_STEPS] * 2
    assert report.vjps.tolist() == [1, 1]


def test_lanes_with_refused_steps_take_the_steps_of_the_host():
    """One lane waits with a refused step at a wall, while the other one runs on."""
    rates = np.asarray([[0.5], [0.9], [0.5], [0.3]]) * np.linspace(0.9, 1.0, 4)
    settings = {"forward__solver": "picard", "forward__rtol": 1e-5, "forward__max_steps": 12}
    settings["forward__on_failure"] = "ignore"

    def solve(s, xp):
        return deqcore.fixed_point(lambda z, s: xp.where(z > 3.0, np.nan, s * z + 1.0), xp.ones_like(s), s, **settings)

    host, found = solve(rates, np), jax.vmap(lambda s: solve(s, jnp))(jnp.asarray(rates.reshape(2, 2, 4)))
    assert found.steps.ravel().tolist() == host.steps.tolist()
    assert found.status.ravel().tolist() == host.status.tolist()
    assert np.asarray(found.z).reshape(4, 4) == pytest.approx(host.z, rel=1e-12)
