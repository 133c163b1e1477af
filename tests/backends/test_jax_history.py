"""Products with histories of more, as many, and fewer slots than a stage of used slots. Truth: NumPy in float64."""

import numpy as np
import pytest

import deqcore

jax = pytest.importorskip("jax")
pytest.importorskip("deqcore_jax")
jnp = jax.numpy

from deqcore_jax.history import STAGES, WIDE  # noqa: E402

BATCH = 2
LEAST, MOST = 2 * STAGES[0], 2 * STAGES[-1] + 1
"""Slots of the smallest history that is read by stages, and of one that has all of them."""


@pytest.mark.parametrize("slots", [1, STAGES[0] - 1, LEAST, MOST])
def test_products_and_combinations_with_any_number_of_slots(slots):
    backend, n = deqcore.get_backend(backend="jax"), WIDE * MOST
    rng = np.random.default_rng(slots)
    vectors = rng.standard_normal((slots + 2, BATCH, n))
    v, c = rng.standard_normal((BATCH, n)), rng.standard_normal((BATCH, slots))

    @jax.jit
    def products(vectors, written):
        empty = backend.history(vectors[0], slots)
        history = jax.lax.fori_loop(0, written, lambda i, history: history.append(vectors[i]), empty)
        return history.dot(jnp.asarray(v, jnp.float32)), history.combine(jnp.asarray(c, jnp.float32))

    for written in sorted({0, 1, min(STAGES[0], slots), min(STAGES[0] + 1, slots), slots, slots + 2}):
        stored = np.zeros((slots, BATCH, n))  # slot i has the vector that was written there last
        for i in range(written):
            stored[i % slots] = vectors[i]
        dots, combination = products(jnp.asarray(vectors, jnp.float32), written)
        np.testing.assert_allclose(dots, np.einsum("mbn,bn->bm", stored, v), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(combination, np.einsum("bm,mbn->bn", c, stored), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_a_solver_whose_history_is_shorter_than_a_stage(solver):
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    a, b = (q * np.linspace(-0.5, 0.9, 40)) @ q.T, rng.standard_normal((BATCH, 40))

    sol = deqcore.fixed_point(
        lambda z, a, b: z @ a + b,
        jnp.zeros((BATCH, 40)),
        *(jnp.asarray(part, jnp.float32) for part in (a, b)),
        forward__solver=solver,
        forward__options={"history_size": 2},
        forward__max_steps=300,
        forward__rtol=1e-5,
    )
    assert bool(sol.converged.all())
    truth = np.linalg.solve(np.eye(40) - a.T, b.T).T
    np.testing.assert_allclose(sol.value, truth, atol=1e-3)
