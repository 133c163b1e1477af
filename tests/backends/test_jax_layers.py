"""The layers for flax and equinox: the same root and gradients as SciPy, jit, training and evaluation."""

import json
import re

import numpy as np
import pytest

from deqcore.errors import ConfigError, LayerWarning, ProblemError, UnknownNameError

jax = pytest.importorskip("jax")
jnp = jax.numpy
nnx = pytest.importorskip("flax.nnx")
eqx = pytest.importorskip("equinox")
import deqcore_jax.equinox  # noqa: E402
import deqcore_jax.nnx  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compiles")

N, B = 12, 5
TIGHT = {"forward__rtol": 1e-12, "backward__options": {"rtol": 1e-12}, "forward__max_steps": 100}
# Plain iteration compiles fastest, where the solver is not the subject.
PLAIN = {"forward__solver": "picard", "forward__max_steps": 200}
PLAIN_TOO = {**PLAIN, "backward__options": {"rtol": 1e-12, "solver": "picard", "max_steps": 200}}


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
    layer = make(kind, made, forward__rtol=1e-10, **PLAIN)
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


def test_a_trajectory_ends_in_the_solution(kind):
    layer = LAYERS[kind][0](
        lambda z, x: 0.5 * jnp.tanh(z) + x, **{**PLAIN_TOO, "forward__rtol": 1e-9, "forward__max_steps": 60}
    )
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    states = layer.trajectory(x, steps=[1, 3])
    z, expected = jnp.zeros_like(x), []
    for _ in range(3):
        z = 0.5 * jnp.tanh(z) + x
        expected.append(z)
    assert np.allclose(states[0], expected[0])  # the iterate after one step
    assert np.allclose(states[1], expected[2])
    assert np.allclose(states[2], layer(x), atol=1e-9)
    slopes = [jax.jit(jax.grad(lambda x, k=k: layer.trajectory(x, steps=[1, 3])[k].sum()))(x) for k in range(3)]
    for z, slope in zip([expected[0], expected[2], states[2]], slopes, strict=True):
        assert z.shape == slope.shape
        assert np.allclose(slope, 1 / (1 - 0.5 * (1 - jnp.tanh(z) ** 2)), atol=1e-6)  # implicit, at that iterate
    with pytest.raises(ConfigError, match="increasing"):
        layer.trajectory(x, steps=[3, 3])


def test_states_are_trees_and_inputs_many(kind):
    layer = LAYERS[kind][0](
        lambda z, x, y: {"a": 0.5 * z["b"] + x["a"], "b": 0.2 * z["a"] + y}, forward__rtol=1e-9, **PLAIN_TOO
    )
    x, y = {"a": jnp.ones((2, 3)), "b": jnp.zeros((2, 3))}, jnp.full((2, 1), 0.5)
    z = layer(x, y)
    assert np.asarray(z["a"]) == pytest.approx(np.full((2, 3), 1.25 / 0.9), rel=1e-8)
    slope = jax.grad(lambda y: layer(x, y)["a"].sum())(y)
    assert np.asarray(slope) == pytest.approx(np.full((2, 1), 3 * 0.5 / 0.9), rel=1e-8)


def test_a_cell_may_compute_in_a_narrow_dtype_and_be_recomputed(kind):
    def cell(z, x):  # bfloat16 inside, the state's dtype outside
        return (0.4 * jnp.tanh(z.astype(jnp.bfloat16)) + x.astype(jnp.bfloat16)).astype(z.dtype)

    x = jnp.ones((3, 4), jnp.float32)
    narrow = LAYERS[kind][0](cell, forward__rtol=1e-2, **PLAIN)
    z = narrow(x)
    assert z.dtype == jnp.float32
    tight = {**PLAIN_TOO, "forward__rtol": 1e-12}
    exact = LAYERS[kind][0](lambda z, x: 0.4 * jnp.tanh(z) + x, **tight)
    x = x.astype(jnp.float64)
    assert np.allclose(z, exact(x), rtol=2e-2)
    again = LAYERS[kind][0](jax.checkpoint(lambda z, x: 0.4 * jnp.tanh(z) + x), **tight)
    slopes = [jax.grad(lambda x, m=m: m(x).sum())(x) for m in (exact, again)]
    assert np.allclose(*slopes, rtol=1e-12)


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


class Normed(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, z, x):
        return 0.3 * self.norm(z) + x


class Dropped(nnx.Module):
    def __init__(self):
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def __call__(self, z, x):
        return 0.3 * self.drop(z) + x


class Counting(nnx.Module):
    def __init__(self):
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, z, x):
        self.calls[...] += 1
        return 0.3 * z + x


class Scaled(eqx.Module):
    scale: jax.Array

    def __call__(self, z, x):
        return self.scale * z + x


class Frozen(eqx.Module):
    calls: int = 0

    def __call__(self, z, x):
        self.calls = self.calls + 1
        return 0.3 * z + x


class EqxNormed(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __init__(self):
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")

    def __call__(self, z, x, state):
        normed, _ = jax.vmap(self.norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(z, state)
        return 0.3 * normed + x


@pytest.mark.parametrize("transform", [lambda f: f, nnx.jit, lambda f: nnx.grad(lambda layer, x: f(layer, x).sum())])
@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (Normed, r"batch normalisation in training mode \(norm\).*GroupNorm or LayerNorm.*layer\.eval\(\)"),
        (Dropped, r"dropout: drop.*dropout_mask"),
        (Counting, r"Cannot mutate Variable.*pass them as an input"),
    ],
)
def test_an_nnx_cell_that_changes_itself_is_told_what_to_do(cell, message, transform):
    with pytest.raises(ProblemError, match=message):
        transform(lambda layer, x: layer(x))(deqcore_jax.nnx.DEQ(cell()), jnp.ones((4, 3)))


@pytest.mark.parametrize("cell", [Normed, Dropped])
def test_in_evaluation_mode_these_cells_are_functions(cell):
    layer = deqcore_jax.nnx.DEQ(cell(), forward__rtol=1e-6, **PLAIN)
    layer.eval()
    assert np.asarray(layer(jnp.ones((4, 3)))) == pytest.approx(np.full((4, 3), 1 / 0.7), rel=1e-4)


def test_an_equinox_cell_that_changes_itself_is_told_what_to_do():
    with pytest.raises(ProblemError, match=r"cannot assign to field 'calls'.*pass them as an input"):
        deqcore_jax.equinox.DEQ(Frozen())(jnp.ones((4, 3)))


def test_a_bound_method_of_an_equinox_layer_carries_the_weights():
    backward = {**PLAIN_TOO["backward__options"], "rtol": 1e-6}
    settings = {**PLAIN, "forward__rtol": 1e-6, "backward__options": backward}
    layer = deqcore_jax.equinox.DEQ(Scaled(jnp.asarray(0.5)), **settings)
    grads = eqx.filter_grad(lambda solve: solve(jnp.ones((4, 3))).value.sum())(layer.solve)
    assert [float(leaf) for leaf in jax.tree.leaves(grads)] == pytest.approx([12 / 0.5**2], rel=1e-4)


def test_batch_normalisation_of_equinox_is_explained():
    cell, state = eqx.nn.make_with_state(EqxNormed)()
    layer = deqcore_jax.equinox.DEQ(cell, forward__rtol=1e-4, **PLAIN)
    x = jax.random.normal(jax.random.key(0), (4, 3))
    with pytest.warns(LayerWarning, match=r"\(norm\).*GroupNorm or LayerNorm.*inference_mode") as warned:
        layer(x, state)
    assert warned[0].filename == __file__
    assert eqx.nn.inference_mode(layer)(x, state).shape == (4, 3)  # without a warning


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (lambda z, x: z[:, :2], r"must keep the shape of z, which is \(4, 3\).*got \(4, 2\)"),
        (lambda z, x: (0.3 * z + x).astype(jnp.bfloat16), r"must keep the dtype of z, float32 \(got bfloat16\)"),
        (lambda z, x: {"z": z}, "must return a tree like z"),
        (lambda z, x: None, "must return a tree like z"),
    ],
)
def test_a_cell_that_returns_something_else_is_refused(kind, cell, message):
    with pytest.raises(ProblemError, match=message):
        LAYERS[kind][0](cell)(jnp.ones((4, 3), jnp.float32))


@pytest.mark.parametrize(
    ("cell", "inputs", "message"),
    [
        (lambda z: 0.3 * z, 1, r"1 input.*2 argument.*function takes \(z\) \(too many.*linear\(z\) \+ x"),
        (jax.vmap(lambda z, x, y: z), 1, r"takes \(z, x, y\) \(missing a required argument: 'y'\)"),
    ],
)
def test_a_cell_that_takes_other_arguments_is_told(kind, cell, inputs, message):
    with pytest.raises(ProblemError, match=message):
        LAYERS[kind][0](cell)(*[jnp.ones((4, 3), jnp.float32)] * inputs)


def test_a_module_of_the_framework_is_no_cell():
    x = jnp.ones((4, 3), jnp.float32)
    with pytest.raises(ProblemError, match=r"Linear takes \(x"):
        deqcore_jax.equinox.DEQ(eqx.nn.Linear(3, 3, key=jax.random.key(0)))(x)
    with pytest.raises(TypeError) as found:  # flax takes the input for another argument of its own
        deqcore_jax.nnx.DEQ(nnx.Linear(3, 3, rngs=nnx.Rngs(0)))(x)
    assert re.search(
        r"Linear, which takes \(inputs.*an input was passed as out_sharding", " ".join(found.value.__notes__)
    )


def test_a_type_error_in_a_cell_stays_what_it_is(kind):
    with pytest.raises(TypeError, match="unsupported operand"):
        LAYERS[kind][0](lambda z, x: z + None)(jnp.ones((4, 3), jnp.float32))


def test_an_empty_batch_stays_empty(kind, made):
    layer = make(kind, made)
    x = jnp.zeros((0, 4))
    assert layer(x).shape == (0, N)
    w, b, dx = gradient(kind, layer, x, jnp.zeros((0, N)))
    assert not np.any(w)
    assert not np.any(b)
    assert dx.shape == x.shape


def test_a_checkpoint_with_other_settings_says_which(kind, made):
    saved = json.dumps(make(kind, made, forward__rtol=1e-3).settings.as_dict())
    difference = r"overrides\.forward__rtol: 0\.001 in the checkpoint, 1e-08 in the layer"
    with pytest.warns(LayerWarning, match=difference) as warned:
        make(kind, made, forward__rtol=1e-8).check_settings(json.loads(saved))
    assert warned[0].filename == __file__
    options = {"forward__options": {"history_size": 4}, "evaluation": {"forward__max_steps": 9}}
    make(kind, made, **options).check_settings(
        json.loads(json.dumps(make(kind, made, **options).settings.as_dict()))
    )  # the same: no word
