"""The direct adjoint solve in traced code, against `numpy.linalg.solve`."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")


def test_the_gradient_of_a_stiff_layer_is_right_under_jit():
    """Symmetric, 200 unknowns, eigenvalues from .3 to .9999: forty products leave it wrong by 89 %."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((200, 200)))[0]
    matrix, g = q @ np.diag(np.linspace(0.3, 0.9999, 200)) @ q.T, rng.standard_normal((3, 200))
    stored, zeros = jnp.asarray(matrix, jnp.float32), jnp.zeros((3, 200), jnp.float32)

    def loss(x):
        z = deqcore.fixed_point(lambda z: z @ stored.T + x, zeros, backward__strategy="exact-ift").value
        return jnp.sum(z * jnp.asarray(g, jnp.float32))

    expected = np.linalg.solve(np.eye(200) - matrix.T, g.T).T
    error = np.linalg.norm(np.asarray(jax.jit(jax.grad(loss))(zeros)) - expected, axis=1)
    assert (error <= 2e-3 * np.linalg.norm(expected, axis=1)).all()
