"""Layers for flax and equinox: `backward.on_failure` and verification reach the person who trains them.

The gradient of z = a z + x with respect to x is 1 / (1 − a) per sample; the coupled cell is that of
`test_jax_verification.py`.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from deqcore.errors import ConvergenceWarning, CoupledRowsWarning
from deqcore.solve import ledger

jax = pytest.importorskip("jax")
jnp = jax.numpy
nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")
import deqcore_jax.equinox  # noqa: E402
import deqcore_jax.nnx  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compiles")

A = np.float32([[0.5], [0.999]])  # plain iteration of the adjoint: the first sample is done in 30 steps
SETTINGS = {
    "backward__options": {"solver": "picard", "rtol": 1e-6, "max_steps": 30},
    "forward__on_failure": "ignore",
}
X = np.ones((2, 1), np.float32)


class Slow:
    def __call__(self, z, x):
        return self.a * z + x

    def initial_state(self, x):
        return jax.lax.stop_gradient(x / (1 - A))


class Shifted:
    def __call__(self, z, x):
        return self.a[:1] * jnp.tanh(jnp.roll(z, -1, axis=0)) + x


def nnx_cell(kind):
    class Cell(kind, nnx.Module):
        def __init__(self):
            self.a = nnx.Param(jnp.asarray(A))

    return deqcore_jax.nnx.DEQ, Cell()


def eqx_cell(kind):
    class Cell(kind, eqx.Module):
        a: jax.Array

    return deqcore_jax.equinox.DEQ, Cell(jnp.asarray(A))


def gradient(make, kind, jit=False, **settings):
    """dL/dx through a layer, by the framework's own transformations."""
    layer_class, cell = make(kind)
    layer = layer_class(cell, forward__solver="picard", **(SETTINGS if kind is Slow else {}), **settings)

    def loss(layer, x):
        return jnp.sum(layer(x) * jnp.arange(1.0, x.size + 1).reshape(x.shape))

    if make is nnx_cell:
        fn = nnx.grad(loss, argnums=1)
        return (nnx.jit(fn) if jit else fn), layer
    fn = lambda layer, x: jax.grad(lambda x: loss(layer, x))(x)
    return (eqx.filter_jit(fn) if jit else fn), layer


def warned(fn, *args):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        out = jax.block_until_ready(fn(*args))
        jax.effects_barrier()
    return [each for each in found if issubclass(each.category, (ConvergenceWarning, CoupledRowsWarning))], out


@pytest.fixture(autouse=True)
def first_pass():
    ledger.forget()


@pytest.fixture(params=[nnx_cell, eqx_cell], ids=["nnx", "equinox"])
def make(request):
    return request.param


def test_a_failed_adjoint_warns_at_the_users_line(make):
    (found,), _ = warned(*gradient(make, Slow), X)
    assert found.category is ConvergenceWarning
    assert "1 of 2 samples (1 MAX_STEPS" in str(found.message)
    assert found.filename == __file__


@pytest.mark.parametrize(("how", "left"), [("zero", 0.0), ("nan", np.nan)])
def test_only_the_sample_that_fails_loses_its_gradient(make, how, left):
    found, out = warned(*gradient(make, Slow, jit=True, backward__on_failure=how), X)
    assert not found
    assert float(out[0, 0]) == pytest.approx(2.0, rel=1e-5)
    assert np.array_equal(np.asarray(out[1, 0]), left, equal_nan=True)


def test_compiled_layers_warn_and_raise_if_asked_to(make):
    silent, _ = warned(*gradient(make, Slow, jit=True), X)
    assert not silent
    found, _ = warned(*gradient(make, Slow, jit=True, backward__on_failure="warn"), X)
    assert [each.category for each in found] == [ConvergenceWarning]
    fn, layer = gradient(make, Slow, jit=True, backward__on_failure="raise")
    with pytest.raises(Exception, match="The adjoint solve did not converge for 1 of 2 samples"):
        jax.block_until_ready(fn(layer, X))


def test_coupled_rows_are_found(make):
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    found, _ = warned(*gradient(make, Shifted), x)  # of the solve, and of its gradient
    assert {each.category for each in found} == {CoupledRowsWarning}
    (found, *_), _ = warned(*gradient(make, Shifted, jit=True, backward__verify_every=1), x)
    assert found.category is CoupledRowsWarning
