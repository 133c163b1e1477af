"""The spectral radius against `numpy.linalg.eigvals` of dense Jacobians."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deqcore
from deqcore.diagnostics import spectral_radius
from deqcore.errors import ConfigError, InitialIterateError, ProblemError

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")


def affine(be, a):
    """f(z) = A z with one A per sample."""
    stored = be.asarray(a)
    return lambda z: be.xp.sum(stored * z[:, None, :], axis=2)


def radius(a):
    return np.abs(np.linalg.eigvals(a)).max(axis=1)


def pair(n, modulus, angle, rng):
    """A matrix whose largest eigenvalues are a complex pair, the others being well below."""
    a = np.diag(0.5 * modulus * rng.uniform(-1, 1, n))
    a[:2, :2] = modulus * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    v = np.eye(n) + 0.4 * rng.standard_normal((n, n)) / np.sqrt(n)
    return v @ a @ np.linalg.inv(v)


def test_each_sample_has_its_own(every):
    rng = np.random.default_rng(0)
    a = np.stack([scale * rng.standard_normal((30, 30)) / np.sqrt(30) for scale in (0.3, 0.9, 1.5)])
    spectrum = spectral_radius(affine(every, a), every.asarray(np.zeros((3, 30))), tolerance=1e-9)
    assert spectrum.radius == pytest.approx(radius(a), rel=1e-7)
    assert spectrum.products <= 30


def test_a_complex_pair_is_found_with_its_angle(be):
    rng = np.random.default_rng(1)
    a = np.stack([pair(40, 0.97, angle, rng) for angle in (0.3, 1.6, 3.0)])
    spectrum = spectral_radius(affine(be, a), be.asarray(np.zeros((3, 40))), tolerance=1e-8, max_products=40)
    assert spectrum.radius == pytest.approx([0.97] * 3, rel=1e-6)
    assert np.angle(spectrum.eigenvalue) == pytest.approx([0.3, 1.6, 3.0], rel=1e-5)


def test_non_normal(be):
    rng = np.random.default_rng(2)
    a = np.stack([np.triu(rng.standard_normal((25, 25)), 1) / 5 + np.diag(rng.uniform(-0.8, 0.8, 25)) for _ in "ab"])
    spectrum = spectral_radius(affine(be, a), be.asarray(np.zeros((2, 25))), tolerance=0.0)
    assert spectrum.products == 25
    assert spectrum.radius == pytest.approx(np.abs(np.diagonal(a, axis1=1, axis2=2)).max(axis=1), rel=1e-5)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), symmetric=st.booleans())
def test_any_small_matrix(seed, n, symmetric):
    a = np.random.default_rng(seed).standard_normal((2, n, n))
    a = a + np.swapaxes(a, 1, 2) if symmetric else a
    spectrum = spectral_radius(affine(deqcore.get_backend(backend="numpy"), a), np.zeros((2, n)), tolerance=0.0)
    assert spectrum.radius == pytest.approx(radius(a), rel=1e-6)


def test_the_error_bounds_what_few_products_miss():
    """Normal J: an eigenvalue lies within `error` of the Ritz value."""
    rng = np.random.default_rng(3)
    q = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    values = rng.uniform(-1, 1, 60)
    a = (q @ np.diag(values) @ q.T)[None]
    spectrum = spectral_radius(affine(deqcore.get_backend(backend="numpy"), a), np.zeros((1, 60)), max_products=8)
    assert spectrum.products == 8
    assert np.abs(values - spectrum.eigenvalue.real).min() <= spectrum.error[0] * (1 + 1e-9)
    assert spectrum.error[0] > 0


def test_at_a_state_of_a_nonlinear_function_in_float32():
    torch.manual_seed(0)
    w = 0.8 * torch.randn(50, 50) / 50**0.5
    z = torch.randn(4, 5, 10)
    spectrum = spectral_radius(
        lambda z, w: torch.tanh(z.reshape(-1, 50) @ w.T).reshape(-1, 5, 10), z, w, tolerance=1e-4
    )
    slope = 1 - torch.tanh(z.reshape(-1, 50) @ w.T) ** 2
    assert spectrum.radius == pytest.approx(radius((slope[:, :, None] * w).double().numpy()), rel=2e-3)


def test_a_nan_stays_in_its_sample(every):
    a = np.stack([0.5 * np.eye(4), np.full((4, 4), np.nan), 0.25 * np.eye(4)])
    spectrum = spectral_radius(affine(every, a), every.asarray(np.ones((3, 4))))
    assert spectrum.radius[[0, 2]] == pytest.approx([0.5, 0.25])
    assert np.isnan(spectrum.radius[1])
    assert np.isnan(spectrum.error[1])


def test_nothing_to_measure(be):
    spectrum = spectral_radius(lambda z: 0.5 * z, be.asarray(np.zeros((0, 4))))
    assert spectrum.radius.shape == spectrum.error.shape == (0,)
    assert spectrum.products == 0
    flat = spectral_radius(lambda z: 0 * z, be.asarray(np.ones((2, 4))))
    assert flat.radius == pytest.approx([0.0, 0.0])


def test_a_coupled_batch_is_one_system(be):
    coupled = spectral_radius(lambda z: 0.5 * be.xp.flip(z, axis=0), be.asarray(np.ones((2, 3))), batch=False)
    assert coupled.radius == pytest.approx([0.5])


def test_bad_input():
    f, z = (lambda z: 0.5 * z), np.zeros((1, 2))
    with pytest.raises(ConfigError, match="max_products must be .*got 0"):
        spectral_radius(f, z, max_products=0)
    with pytest.raises(ConfigError, match="tolerance must be .*got -1"):
        spectral_radius(f, z, tolerance=-1.0)
    with pytest.raises(InitialIterateError, match="int64"):
        spectral_radius(f, np.zeros((1, 2), int))
    with pytest.raises(InitialIterateError, match="batch axis"):
        spectral_radius(f, np.zeros(2))
    with pytest.raises(ProblemError, match="shape"):
        spectral_radius(lambda z: z[:, :1], z)
