"""JAX: the true adjoint residual, and rows that f couples, in eager transformations, through the tap, and on request.

The truth is dense implicit differentiation of the whole state by NumPy.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

import deqcore
from deqcore import Status
from deqcore.errors import ConvergenceError, ConvergenceWarning, CoupledRowsWarning
from deqcore.solve import ledger
from deqcore.types import AdjointReport

jax = pytest.importorskip("jax")
jnp = jax.numpy
import deqcore_jax.adjoint_tap  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROWS, WIDTH = 6, 4
RNG = np.random.default_rng(3)
X = RNG.standard_normal((ROWS, WIDTH)).astype(np.float32)
G = RNG.standard_normal((ROWS, WIDTH)).astype(np.float32)


@pytest.fixture(autouse=True)
def first_pass():
    ledger.forget()


def shifted(z, x):
    """Each row depends on the next one only."""
    return 0.5 * jnp.tanh(jnp.roll(z, -1, axis=0)) + x


def normalized(z, x):
    """Batch normalization in training mode."""
    centred = z - z.mean(0)
    return 0.6 * centred / jnp.sqrt((centred**2).mean(0) + 1e-3) + x


def attention(z, x):
    """Attention over the first axis."""
    return 0.5 * jax.nn.softmax(z @ z.T, axis=1) @ jnp.tanh(z) + x


COUPLED = [shifted, normalized, attention]


@functools.cache
def solution(f):
    """z* by Newton steps, and (I − J)^-T g of the whole state, by dense linear algebra."""
    with jax.enable_x64(True):
        x, z = np.asarray(X, np.float64), np.zeros((ROWS, WIDTH))
        at = jax.jit(lambda z: (f(z, x) - z, jax.jacrev(lambda z: f(z, x))(z)))
        for _ in range(60):
            left, jacobian = (np.asarray(each) for each in at(z))
            jacobian = jacobian.reshape(z.size, z.size)
            z = z + np.linalg.solve(np.eye(z.size) - jacobian, left.ravel()).reshape(z.shape)
        assert np.linalg.norm(left) < 1e-9
    u = np.linalg.solve(np.eye(z.size) - jacobian.T, np.asarray(G, np.float64).ravel())
    return z.astype(np.float32), u.reshape(z.shape), jacobian.reshape(*z.shape, *z.shape)


# Plain iteration and GMRES without its fallback: they compile fastest, and what is measured needs no other.
GIVEN = {"forward__solver": "picard", "forward__max_steps": 200, "forward__on_failure": "ignore"}
ALONE = {"backward__options": {"direct": 0}}
PICARD = {"forward__solver": "picard", "backward__options": {"solver": "picard"}}


def loss_of(f, z0, **settings):
    settings = {**GIVEN, **ALONE, **settings}
    return lambda x: (deqcore.fixed_point(f, jnp.asarray(z0), x, **settings).value * G).sum()


def tapped(f, z0, **settings):
    def loss(x, figures):
        with deqcore_jax.adjoint_tap.reporting(figures):
            return loss_of(f, z0, **settings)(x)

    return jax.grad(loss, argnums=(0, 1))


def warned(fn, *args, times=1):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(times):
            jax.block_until_ready(fn(*args))
        jax.effects_barrier()
    return [each for each in found if issubclass(each.category, (ConvergenceWarning, CoupledRowsWarning))]


class FirstPass(NamedTuple):
    """What the first eager gradient of a cell gives by default."""

    f: Callable
    u: np.ndarray
    report: AdjointReport
    warnings: list


@pytest.fixture(scope="module", params=COUPLED, ids=lambda f: f.__name__)
def first(request):
    ledger.forget()
    f = request.param
    fn, found = tapped(f, solution(f)[0]), []
    texts = warned(lambda: found.extend(fn(X, deqcore_jax.adjoint_tap.new(ROWS))))
    return FirstPass(f, np.asarray(found[0], np.float64), deqcore_jax.adjoint_tap.read(found[1]), texts)


def test_an_eager_gradient_names_the_cause_and_the_cure(first):
    z, u, _ = solution(first.f)
    (found,) = first.warnings
    assert found.category is CoupledRowsWarning
    assert found.filename == __file__
    assert "Set forward.batch = false" in str(found.message)
    alone = jax.grad(loss_of(first.f, z, forward__batch=False))(X)
    assert np.linalg.norm(alone - u) <= 1e-3 * np.linalg.norm(u)


def check_measured(f, u, report):
    _, _, jacobian = solution(f)
    left = np.linalg.norm(G + np.einsum("ijkl,ij->kl", jacobian, u) - u, axis=1) / np.linalg.norm(G, axis=1)
    assert np.asarray(report.residual) == pytest.approx(left, rel=2e-2, abs=1e-4)
    assert (report.coupling > 0).any()
    assert (report.verify_vjps == 2).all()
    assert (np.asarray(report.status)[left > 0.05] != int(Status.CONVERGED)).all()
    assert np.isnan(report.error).all()


def test_the_tap_has_the_measured_residual(first):
    check_measured(first.f, first.u, first.report)


def test_the_tap_has_the_measured_residual_in_compiled_code():
    """One cell is enough: compiled code runs the same trace, if `verify_every` puts it in."""
    z, _, _ = solution(attention)
    fn = jax.jit(tapped(attention, z, backward__on_failure="ignore", backward__verify_every=1))
    u, figures = fn(X, deqcore_jax.adjoint_tap.new(ROWS))
    check_measured(attention, np.asarray(u, np.float64), deqcore_jax.adjoint_tap.read(figures))


def test_the_schedule_in_eager_transformations_and_its_cost():
    f = lambda z, x: 0.5 * jnp.tanh(z) + x
    fn = tapped(f, jnp.zeros_like(X), backward__verify_every=2, **PICARD)
    figures = [fn(X, deqcore_jax.adjoint_tap.new(ROWS))[1] for _ in range(3)]
    reports = [deqcore_jax.adjoint_tap.read(each) for each in figures]
    assert [int(each.verify_vjps[0]) for each in reports] == [2, 0, 2]
    assert len({tuple(each.vjps.tolist()) for each in reports}) == 1, "verification is counted apart"
    assert [bool(jnp.isnan(each.coupling).all()) for each in reports] == [False, True, False]
    never = tapped(f, jnp.zeros_like(X), backward__verify_every=0, **PICARD)(X, deqcore_jax.adjoint_tap.new(ROWS))[1]
    assert not never.verify_vjps.any()


def test_coupled_rows_are_measured_again_and_reported_rarely():
    z, _, _ = solution(shifted)
    fn = jax.grad(loss_of(shifted, z))
    assert len(warned(fn, X, times=1)) == 1
    for _ in range(11):
        last = warned(fn, X)
    assert len(last) == 0
    assert len(warned(fn, X, times=1)) == 0


def test_a_call_without_a_backward_pass_is_not_the_first_one():
    """Eager vmap looks like a gradient until it is over: the first pass that runs is verified all the same."""
    z, _, _ = solution(shifted)
    run = lambda x: deqcore.fixed_point(shifted, jnp.asarray(z), x, **GIVEN, **ALONE).value
    jax.vmap(run)(jnp.stack([X, X]))
    found = warned(jax.grad(lambda x: (run(x) * G).sum()), X)
    assert [each.category for each in found] == [CoupledRowsWarning]


def test_compiled_code_measures_if_a_setting_asks_for_it():
    z, _, _ = solution(shifted)
    silent = jax.jit(jax.grad(loss_of(shifted, z))).lower(X)
    assert "callback" not in silent.as_text()
    assert not warned(silent.compile(), X)
    (found, *_) = warned(jax.jit(jax.grad(loss_of(shifted, z, backward__verify_every=1))), X)
    assert found.category is CoupledRowsWarning
    raising = jax.jit(jax.grad(loss_of(shifted, z, backward__verify_every=1, backward__on_failure="raise")))
    with pytest.raises(jax.errors.JaxRuntimeError, match="rows of the state are coupled by f"):
        jax.block_until_ready(raising(X))


@pytest.mark.parametrize("how", ["zero", "nan"])
def test_what_a_measurement_contradicts_is_replaced(how):
    z, _, _ = solution(shifted)
    fn = jax.jit(jax.grad(loss_of(shifted, z, backward__verify_every=1, backward__on_failure=how)))
    found = np.asarray(fn(X))
    assert np.array_equal(found, np.full_like(found, 0.0 if how == "zero" else np.nan), equal_nan=True)


@pytest.mark.parametrize("how", ["zero", "nan"])
def test_a_cotangent_that_is_not_finite_has_not_failed(how):
    """The rule of every backend: a gradient scaler must see the overflow."""
    f = lambda z, x: 0.5 * z + x
    g = np.ones((2, 3), np.float32)
    g[1] = np.inf

    def loss(x):
        return (deqcore.fixed_point(f, 2 * x, x, backward__on_failure=how).value * g).sum()

    found = np.asarray(jax.jit(jax.grad(loss))(X[:2, :3]))
    assert found[0] == pytest.approx(2.0)
    assert not np.isfinite(found[1]).any()


@pytest.mark.parametrize("strategy", ["exact-ift", "broyden-reuse", "neumann"])
def test_rows_that_are_samples_are_not_suspected(strategy):
    """A dense cell, layer normalization and softmax, in columns of their own of one state."""
    w = 0.3 * RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32)

    def f(z, x):
        (a, b, c), (x, y, t) = (jnp.split(each, 3, axis=1) for each in (z, x))
        normed = (b - b.mean(1, keepdims=True)) / (1e-3 + b.std(1, keepdims=True))
        return jnp.concatenate([jnp.tanh(a @ w + x), 0.4 * normed + y, 0.7 * jax.nn.softmax(c @ w + t, axis=1)], 1)

    def loss(x, figures):
        settings = {"backward__strategy": strategy, "backward__verify_every": 1, "forward__max_steps": 200}
        if strategy != "broyden-reuse":  # which needs an estimate
            settings["forward__solver"] = "picard"
        with deqcore_jax.adjoint_tap.reporting(figures):
            return jnp.square(deqcore.fixed_point(f, jnp.zeros_like(x), x, **settings).value).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((9, 3 * WIDTH)).astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, figures = gradient(x, deqcore_jax.adjoint_tap.new(9))
            jax.effects_barrier()
        assert not figures.coupling.any()
        assert (figures.verify_vjps == 2).all()


def test_transformations_of_verified_gradients():
    """vmap, hessian and jvp of them are those of the closed form z = x / (1 − a)."""
    f = lambda z, x: 0.5 * z + x**2
    value = lambda x: deqcore.fixed_point(f, jnp.zeros_like(x), x, backward__verify_every=1, **PICARD).value.sum()
    x = X[:3, :2]
    assert np.asarray(jax.grad(value)(x)) == pytest.approx(4 * x, rel=1e-3)
    assert np.asarray(jax.vmap(jax.grad(value))(jnp.stack([x, 2 * x]))[1]) == pytest.approx(8 * x, rel=1e-3)
    assert np.asarray(jax.jvp(jax.grad(value), (x,), (jnp.ones_like(x),))[1]) == pytest.approx(4.0, rel=1e-3)
    assert np.asarray(jax.jit(jax.hessian(value))(x[:1, :1])).ravel() == pytest.approx([4.0], rel=1e-3)
    assert not warned(jax.jit(jax.vmap(jax.grad(value))), jnp.stack([x, 2 * x]))


def test_an_error_in_an_eager_gradient():
    z, _, _ = solution(shifted)
    with pytest.raises((ConvergenceError, jax.errors.JaxRuntimeError), match="rows of the state are coupled by f"):
        jax.block_until_ready(jax.grad(loss_of(shifted, z, backward__on_failure="raise"))(X))
