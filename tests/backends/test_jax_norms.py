"""Norms by plain sums of squares, and scaled ones for the rows that need them. Truth: NumPy in float64."""

import numpy as np
import pytest

import deqcore
from deqcore.linear.norms import residual_norms

jax = pytest.importorskip("jax")
jnp = jax.numpy

ROWS = [1.0, 1e-30, 1e30, 0.0, 3.0]


def measured(z, fz):
    backend = deqcore.get_backend(backend="jax")
    return [np.asarray(norm) for norm in jax.jit(lambda z, fz: residual_norms(backend, z, fz))(z, fz)]


def test_norms_of_rows_of_any_size():
    rng = np.random.default_rng(0)
    z, fz = (np.array(ROWS)[:, None] * rng.standard_normal((5, 7)) for _ in range(2))
    residual, size = measured(jnp.asarray(z, jnp.float32), jnp.asarray(fz, jnp.float32))
    np.testing.assert_allclose(residual, np.linalg.norm(fz - z, axis=1), rtol=1e-6)
    np.testing.assert_allclose(size, np.linalg.norm(fz, axis=1), rtol=1e-6)


def test_a_row_has_the_same_bits_beside_any_other():
    rng = np.random.default_rng(1)
    z, fz = (jnp.asarray(rng.standard_normal((5, 7)), jnp.float32) for _ in range(2))
    plain = measured(z, fz)
    extreme = measured(z.at[2].set(0.0), fz.at[2].set(1e30))
    for norm, beside in zip(plain, extreme, strict=True):
        assert np.delete(norm, 2).tobytes() == np.delete(beside, 2).tobytes()


def test_a_row_that_is_not_finite_has_no_finite_norm():
    residual, size = measured(jnp.ones((2, 3)), jnp.array([[1.0, jnp.nan, 0.0], [2.0, 2.0, 2.0]]))
    assert np.isnan([residual[0], size[0]]).all()
    np.testing.assert_allclose([residual[1], size[1]], [3**0.5, 12**0.5], rtol=1e-6)
