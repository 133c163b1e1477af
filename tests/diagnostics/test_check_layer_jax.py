"""`check_layer` on layers in JAX: functions with a custom derivative, modules of flax and equinox, other libraries."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from deqcore.diagnostics import Claims, LayerUnderTest, check_layer
from deqcore.errors import ConfigError

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compiles")

X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
W = 0.3 * np.random.default_rng(1).standard_normal((4, 4)).astype(np.float32)


def cell(z, w, x):
    return jnp.tanh(z @ w + x)


def iterate(step, z, steps=40):
    """Without a loop of JAX, which would be compiled in each call."""
    for _ in range(steps):
        z = step(z)
    return z


def layer_with(sign):
    """z* by plain iteration, whose custom derivative solves u = g + sign · Jᵀu."""

    @jax.custom_vjp
    def layer(w, x):
        return iterate(lambda z: cell(z, w, x), jnp.zeros_like(x))

    def forward(w, x):
        z = layer(w, x)
        return z, (w, x, z)

    def backward(kept, g):
        w, x, z = kept
        _, vjp = jax.vjp(cell, z, w, x)
        u = iterate(lambda u: g + sign * vjp(u)[0], g)
        return vjp(u)[1:]

    layer.defvjp(forward, backward)
    return layer


def check_function(layer, **more):
    subject = LayerUnderTest(layer, cell, (jnp.asarray(W), jnp.asarray(X)), **more)
    return check_layer(subject)


def test_a_custom_derivative_that_is_right_and_one_that_is_wrong():
    report = check_function(layer_with(1.0))
    assert report.ok, report.as_dict()
    assert report.finding("gradient").figures["error"] < 1e-4
    assert report.finding("dtype float64").status == "ok"
    wrong = check_function(layer_with(-1.0))
    assert [finding.check for finding in wrong.failures()] == ["gradient"]
    assert "(I + Jᵀ)u = g" in wrong.finding("gradient").found
    assert not jax.config.jax_enable_x64


def test_a_cell_with_constants_of_the_default_dtype():
    def masked(z, w, x):
        return jnp.tanh(z @ (w * jnp.tril(jnp.ones((4, 4)))) + x)

    layer = lambda w, x: jax.lax.fori_loop(0, 40, lambda _, z: masked(z, w, x), jnp.zeros_like(x))
    report = check_layer(LayerUnderTest(layer, masked, (jnp.asarray(W), jnp.asarray(X))))
    assert report.ok, report.as_dict()
    assert report.finding("dtype float64").status == "ok"


def test_a_loop_without_a_reverse_mode_has_no_gradient():
    def layer(w, x):
        return jax.lax.while_loop(lambda z: jnp.max(jnp.abs(cell(z, w, x) - z)) > 1e-6, lambda z: cell(z, w, x), 0 * x)

    finding = check_function(layer).finding("gradient")
    assert finding.status == "failed"
    assert finding.found.startswith("none: ValueError")


def test_a_detached_state_and_a_global_switch():
    def layer(w, x):
        jax.config.update("jax_default_matmul_precision", "highest")
        return jax.lax.stop_gradient(iterate(lambda z: cell(z, w, x), jnp.zeros_like(x)))

    report = check_function(layer)
    assert "it is zero" in report.finding("gradient").found
    assert "jax_default_matmul_precision" in report.finding("side effects").found
    assert jax.config.jax_default_matmul_precision is None


def implicit(f, x):
    """The state of f, with a right gradient for all that f closes over."""
    z = jax.lax.stop_gradient(iterate(lambda z: f(z, x), jnp.zeros_like(x)))
    return iterate(lambda z: f(z, x), z, 30)  # all of its steps are differentiated


def test_a_module_of_flax_by_its_names():
    nnx = pytest.importorskip("flax.nnx")

    class Cell(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.asarray(W))

        def __call__(self, z, x):
            return jnp.tanh(z @ self.w[...] + x)

    class Layer(nnx.Module):
        def __init__(self, exact):
            self.cell, self.exact = Cell(), exact

        def __call__(self, x):
            z = implicit(self.cell, x)
            return {"z": z if self.exact else self.cell(jax.lax.stop_gradient(z), x)}

    good, bad = Layer(True), Layer(False)
    report = check_layer(LayerUnderTest(good, good.cell, (jnp.asarray(X),), state="z"))
    assert report.ok, report.as_dict()
    found = check_layer(LayerUnderTest(bad, "cell", (jnp.asarray(X),), state="z")).finding("gradient")
    assert "one-step" in found.found


def test_statistics_that_a_cell_writes_while_it_is_differentiated():
    nnx = pytest.importorskip("flax.nnx")

    class Layer(nnx.Module):
        def __init__(self):
            self.w, self.mean = nnx.Param(jnp.asarray(W)), nnx.BatchStat(jnp.zeros(4))

        def cell(self, z, x):
            h = z @ self.w[...] + x
            mean = jnp.mean(h, 0)
            self.mean[...] = jax.lax.stop_gradient(mean)
            return jnp.tanh(h - mean)

        def __call__(self, x):
            return iterate(lambda z: self.cell(z, x), jnp.zeros_like(x), 10)

    claims = Claims(gradient="none", rtol=1.0, unique=False, dtypes=())
    report = check_layer(LayerUnderTest(Layer(), "cell", (jnp.asarray(X),), claims=claims))
    assert [finding.check for finding in report.failures()] == ["batch mates"]
    assert "mean" in report.finding("side effects").found


def test_a_part_of_a_model_of_equinox():
    eqx = pytest.importorskip("equinox")

    class Layer(eqx.Module):
        w: jax.Array

        def f(self, z, x):
            return jnp.tanh(z @ self.w + x)

        def __call__(self, x):
            return implicit(self.f, x)

    class Model(eqx.Module):
        deq: Layer

        def __call__(self, x):
            return self.deq(2.0 * x).sum()

    subject = LayerUnderTest(Model(Layer(jnp.asarray(W))), "f", (jnp.asarray(X),), inner="deq")
    report = check_layer(subject)
    assert report.ok, report.as_dict()
    assert report.name == "Layer"


def test_functions_of_numpy_have_no_gradient_to_check():
    def layer(w, x):
        z = 0 * x
        for _ in range(60):
            z = np.tanh(z @ w + x)
        return z

    subject = LayerUnderTest(layer, lambda z, w, x: np.tanh(z @ w + x), (W.astype(float), X.astype(float)))
    report = check_layer(subject)
    assert report.ok, report.as_dict()
    assert report.finding("gradient").status == "skipped"


def test_a_layer_of_jaxopt():
    jaxopt = pytest.importorskip("jaxopt")
    solver = jaxopt.FixedPointIteration(cell, maxiter=100, tol=1e-6, implicit_diff=True)
    report = check_function(lambda w, x: solver.run(jnp.zeros_like(x), w, x).params)
    assert report.finding("gradient").status == "ok"


@pytest.mark.parametrize("ift", [True, False])
def test_a_layer_of_torchdeq(ift):
    torch = pytest.importorskip("torch")
    torchdeq = pytest.importorskip("torchdeq")

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(W))
            self.deq = torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=60, f_tol=1e-6, b_tol=1e-6, ift=ift)

        def cell(self, z, x):
            return torch.tanh(z @ self.w + x)

        def forward(self, x):
            return self.deq(lambda z: self.cell(z, x), torch.zeros_like(x))

    found = check_layer(LayerUnderTest(Layer(), "cell", (torch.tensor(X),), state="0.-1")).finding("gradient")
    assert found.status == ("ok" if ift else "failed"), found


def test_a_wrong_record():
    with pytest.raises(ConfigError, match="Did you mean 'float64'"):
        Claims(dtypes=("float61",))
    with pytest.raises(ConfigError, match="LayerUnderTest"):
        check_layer(partial(cell))
    with pytest.raises(ConfigError, match="gradient"):
        Claims(gradient="exat")
    with pytest.raises(ConfigError, match="rtol"):
        Claims(rtol=-1.0)
