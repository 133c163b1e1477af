"""Parts of cells on JAX: masks, normalised weights, and a cell that always has one fixed point."""

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConfigError

jax = pytest.importorskip("jax")
jnp = jax.numpy
from deqcore_jax.cells import (  # noqa: E402
    Monotone,
    dropout_mask,
    spectrally_normalized,
    weight_normalized,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def test_a_mask_keeps_the_mean_and_may_be_shared():
    mask = np.asarray(dropout_mask(jax.random.key(0), jnp.ones((400, 3, 50)), 0.25, shared=(1,)))
    assert mask.shape == (400, 1, 50)
    assert set(np.unique(mask)) == {0.0, 1 / 0.75}
    assert mask.mean() == pytest.approx(1.0, abs=0.02)


def test_one_mask_serves_a_compiled_solve_and_its_gradient():
    x = jnp.asarray(np.random.default_rng(0).random((4, 64)))

    @jax.jit
    def gradient(x, key):
        mask = dropout_mask(key, x)

        def loss(x):
            backward = {"rtol": 1e-10, "solver": "picard", "max_steps": 2000}
            settings = {"forward__rtol": 1e-10, "forward__solver": "picard", "forward__max_steps": 2000}
            sol = deqcore.fixed_point(
                lambda z: 0.5 * jnp.tanh(mask * z) + x, jnp.zeros_like(x), **settings, backward__options=backward
            )
            return jnp.sum(sol.value), sol.value

        return jax.grad(loss, has_aux=True)(x), mask

    (dx, z), mask = gradient(x, jax.random.key(1))
    assert set(np.unique(mask)) == {0.0, 2.0}
    np.testing.assert_allclose(z, 0.5 * jnp.tanh(mask * z) + x, atol=1e-8)
    np.testing.assert_allclose(dx, 1 / (1 - 0.5 * (1 - jnp.tanh(mask * z) ** 2) * mask), rtol=1e-7)
    assert not np.array_equal(gradient(x, jax.random.key(2))[1], mask)


def test_weights_are_normalised_as_torch_does_it():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    v, g = rng.standard_normal((4, 3, 2)), rng.random(4)
    ours = weight_normalized(jnp.asarray(v), jnp.asarray(g))
    theirs = torch._weight_norm(torch.tensor(v), torch.tensor(g).reshape(4, 1, 1), 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("size", [0.1, 5.0])
def test_a_spectral_norm_is_at_most_its_bound(size):
    w = size * np.random.default_rng(0).standard_normal((6, 2, 4))
    norm = np.linalg.norm(w.reshape(6, 8), 2)
    found, u = spectrally_normalized(jnp.asarray(w), jnp.ones(6), bound=0.9, steps=200)
    np.testing.assert_allclose(found, w * min(1.0, 0.9 / norm), rtol=1e-8)
    again, _ = spectrally_normalized(jnp.asarray(w), u, bound=0.9)
    np.testing.assert_allclose(again, found, rtol=1e-8)


def test_the_derivative_of_a_spectral_norm_is_u_v():
    w = np.random.default_rng(1).standard_normal((5, 5))
    _, u = spectrally_normalized(jnp.asarray(w), jnp.ones(5), steps=500)
    adjoint_tap = np.random.default_rng(2).standard_normal((5, 5))

    def scaled(w):
        return jnp.sum(adjoint_tap * spectrally_normalized(w, u)[0])

    left, s, right = np.linalg.svd(w)
    expected = adjoint_tap / s[0] - np.sum(adjoint_tap * w) / s[0] ** 2 * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(jax.grad(scaled)(jnp.asarray(w)), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_monotone_cell_finds_the_one_solution_whatever_its_weights(scale):
    made = Monotone.new(jax.random.key(1), inputs=3, width=6)
    made = made._replace(a=made.a * scale**0.5, b=made.b * scale**0.5)
    x = jax.random.normal(jax.random.key(2), (2, 3))
    plain = {"forward__solver": "picard", "forward__max_steps": 400_000, "forward__rtol": 1e-9}
    z = np.asarray(deqcore.fixed_point(made.cell(0.5), jnp.zeros((2, 6)), x, **plain).value)
    w = np.asarray(made.apply_w(jnp.eye(6), 0.5)).T
    assert np.linalg.eigvalsh(np.eye(6) - (w + w.T) / 2).min() >= 0.5 - 1e-9
    residual = z - np.maximum(z @ w.T + np.asarray(x @ made.u + made.bias), 0)
    assert np.abs(residual).max() < 1e-4 * np.abs(z).max()
    assert made.step_size(0.5) <= 0.5 / np.linalg.norm(np.eye(6) - w, 2) ** 2


def test_gradients_of_a_monotone_cell_have_their_closed_form():
    made = Monotone.new(jax.random.key(3), inputs=3, width=6)
    x = jax.random.normal(jax.random.key(4), (1, 3))

    def solve(made):
        options = {"forward__rtol": 1e-12, "forward__max_steps": 400, "backward__options": {"rtol": 1e-12}}
        z = deqcore.fixed_point(made.cell(0.5), jnp.zeros((1, 6)), x, **options).value
        return jnp.sum(z), z

    grads, z = jax.jit(jax.grad(solve, has_aux=True))(made)
    on = np.asarray(made.cell(0.5)(z, x)[0] > 0, float)  # z = D (W z + drive) with D the units that are on
    w = np.asarray(made.apply_w(jnp.eye(6), 0.5)).T
    expected = np.linalg.solve((np.eye(6) - on[:, None] * w).T, np.ones(6)) * on
    np.testing.assert_allclose(grads.bias, expected, atol=1e-8)


def test_bad_options_are_refused():
    key, x = jax.random.key(0), jnp.ones((2, 3))
    with pytest.raises(ConfigError, match="below 1"):
        dropout_mask(key, x, 1.0)
    with pytest.raises(ConfigError, match="axes from 1 to 1"):
        dropout_mask(key, x, 0.5, shared=(0,))
    with pytest.raises(ConfigError, match="above 0"):
        spectrally_normalized(x, jnp.ones(2), bound=0.0)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        spectrally_normalized(x, jnp.ones(2), steps=0)
    with pytest.raises(ConfigError, match="above 0"):
        Monotone.new(key, 2, 3).cell(0.0)
