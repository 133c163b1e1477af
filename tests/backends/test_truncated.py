"""Strategies of a fixed cost are the gradient of a truncated map: closed forms and central differences, everywhere.

From z* the map takes K + 1 steps z ← z + λ (f(z) − z); z* itself is held. `jacobian-free` is K = 0, `neumann` has
λ = 1, `phantom` any.
"""

from __future__ import annotations

import numpy as np
import pytest

import deqcore

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

N, B = 3, 2
STRATEGIES = {  # strategy, its options: steps, damping
    "jacobian-free": ("jacobian-free", {}, 1, 1.0),
    "neumann 0": ("neumann", {"terms": 0}, 1, 1.0),
    "neumann 3": ("neumann", {"terms": 3}, 4, 1.0),
    "phantom 1": ("phantom", {"steps": 1, "damping": 0.3}, 1, 0.3),
    "phantom 4": ("phantom", {"steps": 4, "damping": 0.7}, 4, 0.7),
}


@pytest.fixture
def be(every):
    return every


@pytest.fixture
def data():
    r = np.random.default_rng(3)
    return 0.4 * r.standard_normal((N, N)), r.standard_normal((B, N)), r.standard_normal((B, N))


def gradients(be, f, data, strategy, options):
    a, b, g = (be.asarray(x) for x in data)
    settings = {"forward__solver": "picard", "forward__rtol": 1e-14, "forward__max_steps": 300}
    z, (da, db) = deqcore.vjp(
        lambda z, a, b: f(be.xp, z, a, b),
        0 * b,
        a,
        b,
        cotangent=g,
        **settings,
        backward__strategy=strategy,
        backward__options=options,
    )
    return be.to_numpy(z), be.to_numpy(da), be.to_numpy(db)


def affine(xp, z, a, b):
    return xp.matmul(z, a.T) + b


def tanh(xp, z, a, b):
    return xp.tanh(xp.matmul(z, a.T) + b)


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_affine_cell_has_the_closed_form_of_a_damped_series(be, data, name):
    """u = λ Σ_{j<k} ((1 − λ) I + λ Aᵀ)^j g."""
    strategy, options, steps, damping = STRATEGIES[name]
    a, b, g = data
    _, da, db = gradients(be, affine, data, strategy, options)
    step = (1 - damping) * np.eye(N) + damping * a  # a row vector times it is a step of the transposed system
    u = damping * sum(g @ np.linalg.matrix_power(step, j) for j in range(steps))
    z = np.linalg.solve(np.eye(N) - a, b.T).T
    assert np.allclose(db, u, rtol=1e-9)
    assert np.allclose(da, u.T @ z, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_tanh_cell_has_the_central_differences_of_the_truncated_map(be, data, name):
    strategy, options, steps, damping = STRATEGIES[name]
    a, b, g = data
    held, da, db = gradients(be, tanh, data, strategy, options)

    def loss(a, b):
        z = held
        for _ in range(steps):
            z = z + damping * (tanh(np, z, a, b) - z)
        return (g * z).sum()

    h, r = 1e-5, np.random.default_rng(4)
    for ta, tb in [(r.standard_normal(a.shape), 0 * b), (0 * a, r.standard_normal(b.shape))]:
        slope = (loss(a + h * ta, b + h * tb) - loss(a - h * ta, b - h * tb)) / (2 * h)
        assert (da * ta).sum() + (db * tb).sum() == pytest.approx(slope, rel=1e-7, abs=1e-9)
