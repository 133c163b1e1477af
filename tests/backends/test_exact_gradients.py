"""Exact gradients in float64 at rtol 1e-12: central differences of solutions that SciPy finds, and closed forms."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from deqcore import get_backend
from deqcore.testing import golden, worker
from deqcore.testing.golden_values.make import Flat
from deqcore.testing.jobs import Job
from deqcore.testing.problem import rebuild
from deqcore.testing.problems import raveled

JOB = Job("solve", "", "float64", "broyden", "exact-ift", {}, {"rtol": 1e-12, "max_steps": 40}, 1e-12, 200)


def gradients(backend, problem):
    """All gradients of one golden problem by deqcore."""
    pytest.importorskip(backend)
    double = contextlib.nullcontext()
    if backend == "jax":
        import jax

        double = jax.enable_x64(True)
    with double:
        be = get_backend(backend=backend)
        return worker.solve(be, problem, JOB, problem.bound(be))


def slope(problem, name, direction):
    """d⟨g, z*⟩ along a direction of one leaf, by fourth-order central differences of SciPy's roots."""
    g = np.ravel(raveled(problem.direction(), len(problem.inputs)))
    h = 1e-3

    def loss(size):
        leaves = iter([leaf + size * direction if key == name else leaf for key, leaf in problem.leaves()])
        params = rebuild(problem.params, lambda _: next(leaves))
        inputs = rebuild(problem.inputs, lambda _: next(leaves))
        return g @ Flat(problem.name, params, inputs, problem.z0).solution()

    return (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)


@pytest.fixture(scope="module")
def slopes():
    """Along two random directions of every leaf of the tanh MLP and of the small convolution."""
    random = np.random.default_rng(5)
    found = {}
    for problem in ("mlp", "conv"):
        for name, leaf in golden(problem).problem.leaves():
            for direction in random.standard_normal((2, *np.shape(leaf))):
                found.setdefault((problem, name), []).append(
                    (direction, slope(golden(problem).problem, name, direction))
                )
    return found


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("problem", ["mlp", "conv"])
def test_exact_gradients_are_central_differences_of_scipys_roots(backend, problem, slopes):
    found = gradients(backend, golden(problem).problem)
    for (of, name), pairs in slopes.items():
        for direction, expected in pairs if of == problem else []:
            size = np.linalg.norm(found[name]) * np.linalg.norm(direction)
            assert abs(np.sum(found[name] * direction) - expected) <= 1e-8 * size, name


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_exact_gradients_are_the_closed_form_of_an_affine_map(backend):
    problem = golden("affine").problem
    p, x, g = problem.params, problem.inputs, problem.direction()
    a = np.eye(len(p["W"])) - p["W"]
    z = np.linalg.solve(a, (x @ p["U"].T + p["b"]).T).T
    u = np.linalg.solve(a.T, g.T).T
    found = gradients(backend, problem)
    expected = {"z": z, "cotangent": u, "inputs": u @ p["U"]}
    expected |= {"params['W']": u.T @ z, "params['U']": u.T @ x, "params['b']": u.sum(0)}
    for name, value in expected.items():
        assert np.linalg.norm(found[name] - value) <= 1e-8 * np.linalg.norm(value), name
