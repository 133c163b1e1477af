"""The layers for flax and equinox: the same root and gradients as SciPy, jit, training and evaluation."""

import numpy as np
import pytest

from deqcore.errors import ConfigError, ProblemError, UnknownNameError

jax = pytest.importorskip("jax")
jnp = jax.numpy
nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")
import deqcore_jax.equinox  # noqa: E402
import deqcore_jax.nnx  # noqa: E402

N, B = 12, 5
TIGHT = {"forward__rtol": 1e-12, "backward__options": {"rtol": 1e-12}, "forward__max_steps": 100}


class NnxCell(nnx.Module):
    def __init__(self, made):
        self.w, self.u, self.b = (nnx.Param(jnp.asarray(a)) for a in (made.w, made.u, made.b))

    def __call__(self, z, x):
        return jnp.tanh(z @ self.w[...].T + x @ self.u[...].T + self.b[...])

    def initial_state(self, x):
        return jnp.zeros((x.shape[0], N), x.dtype)


class EqxCell(eqx.Module):
    w: jax.Array
    u: jax.Array
    b: jax.Array

    def __init__(self, made):
        self.w, self.u, self.b = map(jnp.asarray, (made.w, made.u, made.b))

    def __call__(self, z, x):
        return jnp.tanh(z @ self.w.T + x @ self.u.T + self.b)

    def initial_state(self, x):
        return jnp.zeros((x.shape[0], N), x.dtype)


LAYERS = {"nnx": (deqcore_jax.nnx.DEQ, NnxCell), "equinox": (deqcore_jax.equinox.DEQ, EqxCell)}


@pytest.fixture(params=list(LAYERS))
def kind(request):
    with jax.enable_x64(True):
        yield request.param


@pytest.fixture
def made(truth):
    return truth.cell(0, B, N, 4)


def make(kind, made, **settings):
    layer, cell = LAYERS[kind]
    return layer(cell(made), **settings)


def gradient(kind, layer, x, g):
    """Gradients of ⟨g, z*⟩ for the weights and the input."""

    def loss(layer, x):
        return jnp.sum(layer(x) * g)

    if kind == "nnx":
        grads, dx = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(layer, x)
        return grads["cell"]["w"][...], grads["cell"]["b"][...], dx
    grads, dx = eqx.filter_jit(eqx.filter_grad(lambda both: loss(*both)))((layer, x))
    return grads.cell.w, grads.cell.b, dx


def test_a_layer_gives_scipys_root_and_the_closed_gradients(kind, made, truth):
    layer = make(kind, made, **TIGHT)
    x, g = jnp.asarray(made.x), np.random.default_rng(1).standard_normal((B, N))
    assert np.asarray(layer(x)) == pytest.approx(made.root, abs=1e-9)
    w, b, dx = gradient(kind, layer, x, g)
    expected = truth.cell_gradients(made, g)
    assert np.asarray(w) == pytest.approx(expected.w, rel=1e-7, abs=1e-9)
    assert np.asarray(b) == pytest.approx(expected.b, rel=1e-7, abs=1e-9)
    assert np.asarray(dx) == pytest.approx(expected.x, rel=1e-7, abs=1e-9)


def test_a_changed_weight_counts_at_the_next_call(kind, made):
    layer = make(kind, made, forward__rtol=1e-10)
    x = jnp.asarray(made.x)
    call = nnx.jit(lambda m, x: m(x)) if kind == "nnx" else eqx.filter_jit(lambda m, x: m(x))
    call(layer, x)
    if kind == "nnx":
        layer.cell.w[...] = 0.5 * layer.cell.w[...]
    else:
        layer = eqx.tree_at(lambda m: m.cell.w, layer, 0.5 * layer.cell.w)
    for z in (layer(x), call(layer, x)):
        assert np.asarray(layer.cell(z, x)) == pytest.approx(np.asarray(z), abs=1e-8)


def test_training_and_evaluation_have_budgets_of_their_own(kind, made):
    layer = make(
        kind,
        made,
        evaluation={"forward__max_steps": 3},
        forward__max_steps=5,
        forward__rtol=0.0,
        forward__on_failure="ignore",
    )
    x = jnp.asarray(made.x)
    assert layer.solve(x).steps.tolist() == [5] * B
    if kind == "nnx":
        layer.eval()
    else:
        layer = eqx.nn.inference_mode(layer)
    assert layer.solve(x).steps.tolist() == [3] * B
    assert layer.solve(x, forward__max_steps=4).steps.tolist() == [4] * B


def test_a_previous_equilibrium_starts_warm(kind, made):
    layer = make(kind, made, forward__rtol=1e-6)
    x = jnp.asarray(made.x)
    z = layer(x)
    assert layer.solve(x + 1e-6, z0=z).steps.max() < layer.solve(x).steps.min() / 2


def test_mistakes_are_told_when_the_layer_is_made(kind, made):
    with pytest.raises(UnknownNameError, match="broyden"):
        make(kind, made, forward__solver="broyde")
    with pytest.raises(ConfigError, match="a module or a function"):
        LAYERS[kind][0](3)
    with pytest.raises(ConfigError, match="Pass z0"):
        LAYERS[kind][0](lambda z: z)()
    with pytest.raises(ProblemError, match="must keep the shape"):
        LAYERS[kind][0](lambda z, x: jnp.concatenate([z, x], 1))(jnp.ones((2, 3)))


def test_weights_survive_a_round_trip(kind, made, tmp_path):
    layer, other = make(kind, made, **TIGHT), make(kind, made, **TIGHT)
    x = jnp.asarray(made.x)
    if kind == "nnx":
        _, state = nnx.split(layer, nnx.Param, ...)[:2]
        nnx.update(other, jax.tree.map(jnp.zeros_like, state))
        nnx.update(other, state)
    else:
        eqx.tree_serialise_leaves(tmp_path / "layer.eqx", layer)
        other = eqx.tree_deserialise_leaves(tmp_path / "layer.eqx", other)
    assert np.array_equal(layer(x), other(x))
