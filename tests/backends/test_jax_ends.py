"""Compiled gradients end: LAPACK's batched LU inside them made XLA's CPU backend wait for ever, now and then."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from deqcore_jax import batched_linalg

import deqcore

PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np
    import deqcore

    rng = np.random.default_rng(0)
    w = jnp.asarray(0.76 * rng.standard_normal((64, 64)) / 8, jnp.float32)

    def loss(w, x, g):
        sol = deqcore.fixed_point(
            lambda z: jnp.tanh(z @ w.T + x), jnp.zeros((64, 64), jnp.float32), forward__solver="broyden",
            forward__rtol=1e-4, backward__strategy="broyden-reuse", forward__on_failure="ignore",
        )
        return jnp.sum(sol.value * g)

    gradient = jax.jit(jax.grad(loss))
    for _ in range(60):
        x, g = (jnp.asarray(rng.standard_normal((64, 64)), jnp.float32) for _ in range(2))
        found = np.asarray(gradient(w, x, g))
    print(np.isfinite(found).all())
"""


def test_sixty_gradients_by_certified_reuse():
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    # The limit is there to end a program that waits for ever: 60 calls take seconds.
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize(("solver", "strategy"), [("broyden", "broyden-reuse"), ("anderson", "exact-ift")])
def test_no_gradient_calls_lapack(solver, strategy):
    def loss(x):
        options = {"forward__solver": solver, "backward__strategy": strategy, "forward__on_failure": "ignore"}
        return jnp.sum(deqcore.fixed_point(lambda z: jnp.tanh(0.5 * z + x), jnp.zeros_like(x), **options).value)

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((4, 16), jnp.float32)).compile().as_text()
    assert "while" in compiled
    assert 'target="lapack' not in compiled


@pytest.mark.parametrize("k", [1, 3, 8, 9, 40])
def test_small_systems_against_numpy(k):
    rng = np.random.default_rng(k)
    a, b = rng.standard_normal((5, k, k)), rng.standard_normal((5, k, 2))
    a[0] = np.flip(np.eye(k), axis=0)  # no pivot on the diagonal
    with jax.enable_x64(True):
        found = jax.jit(batched_linalg.solve)(jnp.asarray(a), jnp.asarray(b))
        np.testing.assert_allclose(found, np.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
        slope = jax.grad(lambda a: jnp.sum(batched_linalg.solve(a, jnp.asarray(b)) ** 2))(jnp.asarray(a))
    x = np.linalg.solve(a, b)
    np.testing.assert_allclose(slope, -np.linalg.solve(np.swapaxes(a, 1, 2), 2 * x) @ np.swapaxes(x, 1, 2), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("kind", ["upper", "positive"])
def test_systems_of_a_known_kind_and_their_derivatives(kind, k):
    rng = np.random.default_rng(k)
    a = rng.standard_normal((3, k, k)) + k * np.eye(k)
    a = np.triu(a) if kind == "upper" else a @ np.swapaxes(a, 1, 2)
    b = rng.standard_normal((3, k, 2))
    solve = getattr(batched_linalg, f"solve_{kind}")
    with jax.enable_x64(True):
        x, vjp = jax.vjp(lambda b: solve(jnp.asarray(a), b), jnp.asarray(b))
        np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(vjp(x)[0], np.linalg.solve(np.swapaxes(a, 1, 2), x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [6, 40])
def test_a_positive_system_near_singularity_is_solved_to_rounding(k):
    """Schur complements of explicit inverses were not: certificates made with them were 3 times too pessimistic."""
    rng = np.random.default_rng(0)
    half = rng.standard_normal((4, k, k // 2)).astype(np.float32) / np.float32(k**0.5)
    a = half @ np.swapaxes(half, 1, 2) + np.float32(1e-4) * np.eye(k, dtype=np.float32)
    b = rng.standard_normal((4, k, 3)).astype(np.float32)
    x = np.asarray(jax.jit(batched_linalg.solve_positive)(jnp.asarray(a), jnp.asarray(b))).astype(float)
    left = np.linalg.norm(b - a.astype(float) @ x, axis=(1, 2))
    scale = np.linalg.norm(a, 2, axis=(1, 2)) * np.linalg.norm(x, axis=(1, 2))
    assert (left <= 20 * k * np.finfo(np.float32).eps * scale).all()


def test_a_singular_system_spoils_no_other():
    a = np.stack([np.eye(3), np.zeros((3, 3)), 2 * np.eye(3)]).astype(np.float32)
    found = np.asarray(batched_linalg.solve(jnp.asarray(a), jnp.ones((3, 3, 1), jnp.float32)))
    assert not np.isfinite(found[1]).any()
    np.testing.assert_array_equal(found[[0, 2], :, 0], [[1, 1, 1], [0.5, 0.5, 0.5]])


@pytest.mark.parametrize(("m", "k"), [(2, 1), (9, 8), (24, 23)])
def test_least_singular_values_against_numpy(m, k):
    rng = np.random.default_rng(k)
    a = rng.standard_normal((6, m, k)) * np.logspace(0, 3, k)
    a[5] = np.eye(m, k)  # all of them equal
    expected = np.linalg.svd(a, compute_uv=False)[:, -1]
    found = jax.jit(batched_linalg.least_singular_value)(jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=5e-3)
    a[0, :, 0] = 0.0
    assert batched_linalg.least_singular_value(jnp.asarray(a, jnp.float32))[0] == 0.0


@pytest.mark.parametrize("columns", [1, 5, 8, 9, 30])
def test_columns_that_are_not_in_use_change_no_least_singular_value(columns):
    rng = np.random.default_rng(columns)
    a = np.zeros((4, 41, 40))
    a[:, : columns + 1, :columns] = rng.standard_normal((4, columns + 1, columns))
    unused = np.arange(columns, 40)
    a[:, unused + 1, unused] = np.linalg.norm(a, axis=(1, 2))[:, None]
    expected = np.linalg.svd(a, compute_uv=False)[:, -1]
    found = jax.jit(batched_linalg.least_singular_value)(jnp.asarray(a, jnp.float32), jnp.int32(columns))
    np.testing.assert_allclose(found, expected, rtol=5e-3)
