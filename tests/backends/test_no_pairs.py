"""Reuse where the solve left no secant pair behind, having started at the solution; bad cotangents beside it."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

N = 3
PLAIN = {"certify": False, "max_relative_error": None, "fallback": "none"}
CERTIFIED = {"certify": True, "max_relative_error": None, "fallback": "none"}


def on(backends, *cases):
    """Parameters of a test: these cases on these backends. JAX compiles each for seconds, so it takes one of a kind."""
    return [(backend, *case) for backend in backends for case in cases]


@pytest.fixture
def be(backend):
    with jax.enable_x64(True):
        yield deqcore.get_backend(backend=backend)


@pytest.fixture
def problem():
    """Cotangents: an ordinary one, zero, one with NaN, an ordinary one. u in closed form."""
    r = np.random.default_rng(6)
    a, b, g = 0.4 * r.standard_normal((N, N)), r.standard_normal((4, N)), r.standard_normal((4, N))
    z = np.linalg.solve(np.eye(N) - a, b.T).T
    u = np.linalg.solve(np.eye(N) - a.T, g.T).T
    g[1], u[1], g[2, 0] = 0.0, 0.0, np.nan
    return a, b, g, z, u


def found(be, problem, strategy, options, solver="broyden"):
    """Steps taken, and the gradient for b, which is u."""
    a, b, g, z, _ = (be.asarray(x) for x in problem)
    settings = {
        "forward__solver": solver,
        "forward__rtol": 1e-8,
        "backward__strategy": strategy,
        "backward__options": options,
    }
    f = lambda z, b: be.xp.matmul(z, a.T) + b
    if be.name == "jax":  # one program for both

        def solve(b):
            sol = deqcore.fixed_point(f, z, b, **settings)
            return sol.value, sol.steps

        _, vjp, steps = jax.vjp(solve, b, has_aux=True)
        return be.to_numpy(steps), be.to_numpy(vjp(g)[0])
    steps = deqcore.fixed_point(f, z, b, **settings).steps
    _, (db,) = deqcore.vjp(f, z, b, cotangent=g, **settings)
    return be.to_numpy(steps), be.to_numpy(db)


@pytest.mark.parametrize(
    ("backend", "options", "solver"),
    on(["numpy", "torch", "jax"], (PLAIN, "broyden"))
    + on(["numpy", "torch"], (CERTIFIED, "broyden"), (PLAIN, "anderson"), (CERTIFIED, "anderson")),
    ids=str,
)
def test_the_plain_estimate_of_no_pairs_is_the_identity(be, problem, options, solver):
    """H = −I, or for Anderson −I times its mixing: u is a multiple of g, finite, and zero where g is."""
    steps, db = found(be, problem, "broyden-reuse", options, solver)
    g = problem[2]
    assert steps.tolist() == [0] * 4
    assert np.allclose(db[[0, 1, 3]], g[[0, 1, 3]], rtol=1e-12, atol=0)
    assert np.isnan(db[2]).any()


@pytest.mark.parametrize(
    ("backend", "strategy", "options", "target"),
    on(["numpy", "torch", "jax"], ("broyden-reuse", {"max_relative_error": 0.01}, 0.01))
    + on(
        ["numpy", "torch"],
        ("broyden-reuse", {"max_relative_error": 1e-3, "fallback": "none"}, 1e-3),
        ("broyden-reuse", {"max_relative_error": 1e-6, "max_refine_vjps": 1, "fallback": "exact-ift"}, 1.0),
        ("exact-ift", {"start": "reuse", "rtol": 1e-10}, 1e-8),
    ),
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The adjoint solve did not converge")  # with one vjp for each part it cannot
def test_certified_reuse_of_no_pairs_reaches_its_target(be, problem, strategy, options, target):
    """With one vjp for each part, the third case can only be better than nothing."""
    steps, db = found(be, problem, strategy, options)
    u = problem[4]
    assert steps.tolist() == [0] * 4
    assert not db[1].any()
    for row in (0, 3):
        assert np.linalg.norm(db[row] - u[row]) <= target * np.linalg.norm(u[row])
