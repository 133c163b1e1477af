"""JAX: modes of differentiation of exact-ift nested in each other and in jit, vmap, scan, checkpoint: closed forms.

Plain iteration solves both equations, since it compiles fastest; a solver does not change how derivatives nest.
"""

from __future__ import annotations

import numpy as np
import pytest

import deqcore

jax = pytest.importorskip("jax")
jnp = jax.numpy

pytestmark = pytest.mark.usefixtures("quick_compiles")

A = 0.4
PICARD = {
    "forward__solver": "picard",
    "forward__rtol": 1e-13,
    "forward__max_steps": 200,
    "backward__strategy": "exact-ift",
    "backward__options": {"solver": "picard", "rtol": 1e-13, "max_steps": 200},
}


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def scalar(a):
    """z* = 1 / (1 − a), whose k-th derivative is k! (1 − a)^-(k+1)."""
    return deqcore.fixed_point(lambda z, a: a * z + 1.0, jnp.zeros((1, 1)), a, **PICARD).value.sum()


NESTED = {
    "jvp": (lambda a: jax.jvp(scalar, (a,), (1.0,))[1], 1),
    "grad of checkpoint": (jax.grad(jax.checkpoint(scalar)), 1),
    "hessian": (jax.hessian(scalar), 2),
    "grad of grad": (jax.grad(jax.grad(scalar)), 2),
    "grad of jacfwd": (jax.grad(jax.jacfwd(scalar)), 2),
    "jacfwd of hessian": (jax.jacfwd(jax.hessian(scalar)), 3),
    "jacfwd three times": (jax.jacfwd(jax.jacfwd(jax.jacfwd(scalar))), 3),
}


@pytest.mark.parametrize("name", NESTED)
@pytest.mark.supports("third derivatives", backends="jax", strategies="exact-ift")
def test_nested_modes_have_the_closed_form_of_a_scalar(name):
    derivative, order = NESTED[name]
    expected = [1, 1, 2, 6][order] * (1 - A) ** -(order + 1)
    assert jax.jit(derivative)(A) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("derivative", "order"), [(jax.grad, 1), (jax.hessian, 2)], ids=["grad", "hessian"])
@pytest.mark.supports("`vmap` of a solve and of its gradient", backends="jax", strategies="exact-ift")
def test_vmap_of_a_derivative_with_and_without_jit(derivative, order):
    a = jnp.asarray([0.1, 0.4, -0.7])
    expected = order * (1 - np.asarray(a)) ** -(order + 1)
    mapped = jax.vmap(derivative(scalar))
    assert np.allclose(jax.jit(mapped)(a), expected, rtol=1e-10)
    if order == 1:
        assert np.allclose(mapped(a), expected, rtol=1e-10)
        assert np.allclose(jax.jit(jax.grad(lambda a: jax.vmap(scalar)(a).sum()))(a), expected, rtol=1e-10)


@pytest.mark.parametrize("strategy", ["broyden-reuse", "jacobian-free", "neumann", "unrolled"])
@pytest.mark.supports(
    "`vmap` of a solve and of its gradient",
    backends="jax",
    strategies="broyden-reuse, jacobian-free, neumann, unrolled",
)
def test_vmap_of_gradients_by_other_strategies(strategy):
    """Of f = a z + 1 at z* = 1 / (1 − a): jacobian-free has u = 1, neumann the first terms of Σ aᵏ, the others all."""
    solver = "broyden" if strategy == "broyden-reuse" else "picard"
    options = {"neumann": {"terms": 3}, "unrolled": {"steps": 60}}.get(strategy, {})
    own = {"forward__solver": solver, "backward__strategy": strategy, "backward__options": options}

    def value(a):
        settings = {"forward__rtol": 1e-9, "forward__max_steps": 200, **own}
        return deqcore.fixed_point(lambda z, a: a * z + 1.0, jnp.zeros((1, 1)), a, **settings).value.sum()

    a = np.asarray([0.1, 0.4, -0.7])
    u = {"jacobian-free": 1.0, "neumann": 1 + a + a**2 + a**3}.get(strategy, 1 / (1 - a))
    found = jax.jit(jax.vmap(jax.grad(value)))(a)
    assert np.allclose(found, u / (1 - a), rtol=5e-2 if strategy == "broyden-reuse" else 1e-6)


def test_a_hessian_vector_product_of_two_numbers_has_its_closed_form():
    """L = ½‖z*‖², z* = (I − A)^-1 b with b closed over: the Hessian in b is (I − A)^-T (I − A)^-1."""
    a = np.asarray([[0.3, 0.2], [-0.1, 0.4]])
    b, v = np.asarray([[1.0, 2.0]]), np.asarray([[0.5, -1.0]])

    def loss(b):
        z = deqcore.fixed_point(lambda z: z @ a.T + b, jnp.zeros((1, 2)), **PICARD).value
        return (z**2).sum() / 2

    inverse = np.linalg.inv(np.eye(2) - a)
    found = jax.jit(lambda b: jax.jvp(jax.grad(loss), (b,), (v,))[1])(b)
    assert np.allclose(found, v @ inverse.T @ inverse, rtol=1e-10)


@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd], ids=["reverse", "forward"])
def test_a_solve_inside_a_scan_over_time(derivative):
    """h ← z* of z = a z + h x, so that three steps give x₁x₂x₃ (1 − a)^-3."""
    inputs = jnp.asarray([1.0, 2.0, 0.5])

    def last(a):
        def step(h, x):
            solution = deqcore.fixed_point(lambda z, h, x: a * z + h * x, jnp.zeros((1, 1)), h, x, **PICARD)
            return solution.value, None

        return jax.lax.scan(step, jnp.ones((1, 1)), inputs)[0].sum()

    assert jax.jit(derivative(last))(A) == pytest.approx(3 * (1 - A) ** -4, rel=1e-10)


def test_a_checkpoint_inside_a_longer_computation():
    """The recomputed part closes over what is differentiated."""
    loss = lambda a: jnp.sin(jax.checkpoint(lambda x: a * scalar(a * x))(0.5))
    found = jax.jit(jax.grad(loss))(A)
    value = A / (1 - A / 2)
    slope = 1 / (1 - A / 2) + (A / 2) / (1 - A / 2) ** 2
    assert found == pytest.approx(np.cos(value) * slope, rel=1e-10)
