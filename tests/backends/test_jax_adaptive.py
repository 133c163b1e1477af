"""The adaptive strategy in JAX: its state is a value that goes in and out of compiled code."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402
from deqcore_jax import adjoint_tap, strategy_state  # noqa: E402

from deqcore.backward.adaptive import Adaptive  # noqa: E402
from deqcore.errors import StrategyError  # noqa: E402

OPTIONS = {"max_relative_error": 0.1, "max_vjps": 3}
SETTINGS = {
    "backward__strategy": "adaptive", "backward__options": OPTIONS, "forward__solver": "picard",
    "forward__rtol": 1e-6, "forward__max_steps": 200, "forward__on_failure": "ignore",
}  # fmt: skip
N, BATCH = 6, 5
TRACED = []


def loss(w, state, tap, x, g):
    TRACED.append(w)
    with strategy_state.carrying(state), adjoint_tap.reporting(tap):
        z = deqcore.fixed_point(lambda z: jnp.tanh(z @ w + x), jnp.zeros_like(x), **SETTINGS).value
    return jnp.sum(z * g)


step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


def exact(w, x, g):
    """dW by a dense solve in float64."""
    z = np.zeros_like(x)
    for _ in range(3000):
        z = np.tanh(z @ w + x)
    slope = 1 - z**2
    u = np.linalg.solve(np.eye(N) - slope[:, None, :] * w[None], g[..., None])[..., 0]
    return z.T @ (u * slope)


def passes(w, state, count, seed):
    rng, errors, vjps, audited = np.random.default_rng(seed), [], [], []
    for _ in range(count):
        x, g = rng.standard_normal((2, BATCH, N)) + 0.3
        arrays = (jnp.asarray(a, jnp.float32) for a in (x, g))
        dw, state, tap = step(jnp.asarray(w, jnp.float32), state, adjoint_tap.new(BATCH), *arrays)
        truth, report = exact(w, x, g), adjoint_tap.read(tap)
        errors.append(np.linalg.norm(np.asarray(dw) - truth) / np.linalg.norm(truth))
        vjps.append(int(report.vjps.max()))
        audited.append(float(report.gradient_error[0]))
    return state, np.array(errors), np.array(vjps), np.array(audited)


@pytest.fixture(scope="module")
def weights():
    w = np.random.default_rng(1).standard_normal((N, N))
    return 0.7 * w / np.linalg.norm(w, 2)


def test_it_keeps_its_promise_and_nothing_compiles_again_when_k_changes(weights):
    state = strategy_state.new("adaptive", OPTIONS)
    TRACED.clear()
    state, errors, vjps, audited = passes(weights, state, 30, 0)
    assert np.mean(errors > 0.1) <= 0.1
    assert len(set(vjps[10:])) > 1, "audits take more vjps than passes between them"
    assert np.isnan(audited[0])
    assert np.isfinite(audited[1:]).any()
    easier, errors, fewer, _ = passes(0.05 * weights, state, 30, 1)
    assert np.mean(errors[10:] > 0.1) <= 0.1
    assert np.median(fewer[15:]) < np.median(vjps[10:])
    assert len(TRACED) == 1
    found = Adaptive(**OPTIONS).learned(easier)
    assert found.passes == 60
    assert found.vjps == vjps.sum() + fewer.sum()


def test_it_decides_as_numpy_does(weights):
    state, held, rng = strategy_state.new("adaptive", OPTIONS), deqcore.StrategyState(), np.random.default_rng(3)
    for _ in range(6):
        x, g = rng.standard_normal((2, BATCH, N))
        arrays = (jnp.asarray(a, jnp.float32) for a in (x, g))
        _, state, _ = step(jnp.asarray(weights, jnp.float32), state, adjoint_tap.new(BATCH), *arrays)
        deqcore.vjp(
            lambda z, w, x: np.tanh(z @ w + x), np.zeros((BATCH, N)), weights, x, cotangent=g, strategy_state=held,
            **SETTINGS,
        )  # fmt: skip
    one, two = (Adaptive(**OPTIONS).learned(values) for values in (state, held.values))
    assert one.chosen == two.chosen
    assert one.audits == two.audits
    assert float(one.error) == pytest.approx(float(two.error), abs=1e-3)


def test_without_a_state_each_pass_is_exact(weights):
    x, g = np.random.default_rng(4).standard_normal((2, BATCH, N))

    def plain(w):
        z = deqcore.fixed_point(lambda z: jnp.tanh(z @ w + x), jnp.zeros((BATCH, N)), **SETTINGS).value
        return jnp.sum(z * g)

    found = jax.grad(plain)(jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(found, exact(weights, x, g), rtol=2e-3, atol=1e-4)


def test_what_cannot_be_carried():
    x = jnp.ones((2, 2))

    def twice(state):
        with strategy_state.carrying(state):
            first = deqcore.fixed_point(lambda z: 0.5 * z + 1, x, **SETTINGS).value
            return jnp.sum(first + deqcore.fixed_point(lambda z: 0.4 * z + 1, x, **SETTINGS).value)

    with pytest.raises(StrategyError, match="second solve"):
        jax.grad(twice)(strategy_state.new("adaptive", OPTIONS))

    def other(state):
        with strategy_state.carrying(state):
            return jnp.sum(deqcore.fixed_point(lambda z: 0.5 * z + 1, x, **SETTINGS).value)

    with pytest.raises(StrategyError, match="shape"):
        jax.grad(other)(strategy_state.new("adaptive"))
    with pytest.raises(StrategyError, match="strategy with state"):
        strategy_state.new("exact-ift")
    with pytest.raises(StrategyError, match="strategy_state must be None"):
        deqcore.fixed_point(lambda z: 0.5 * z + 1, x, strategy_state=deqcore.StrategyState())
