"""orbax stores a layer and its optimiser; training continues from there with the same numbers."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
optax = pytest.importorskip("optax")
ocp = pytest.importorskip("orbax.checkpoint")
import deqcore_jax.nnx  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")]
jnp = jax.numpy
WIDTH = 6


class Cell(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(WIDTH, WIDTH, kernel_init=nnx.initializers.normal(0.2), rngs=nnx.Rngs(0))

    def __call__(self, z, x):
        return jnp.tanh(self.linear(z) + x)


def fresh():
    layer = deqcore_jax.nnx.DEQ(Cell(), forward__rtol=1e-5)
    graph, weights, rest = nnx.split(layer, nnx.Param, ...)
    return graph, rest, weights


def test_training_goes_on_from_a_checkpoint(tmp_path):
    graph, rest, weights = fresh()
    adam = optax.adam(1e-2)

    @jax.jit
    def step(weights, moments, x):
        loss, g = jax.value_and_grad(lambda w: jnp.sum(nnx.merge(graph, w, rest)(x) ** 2))(weights)
        change, moments = adam.update(g, moments)
        return optax.apply_updates(weights, change), moments, loss

    batches = [jax.random.normal(jax.random.key(i), (3, WIDTH)) for i in range(4)]
    state = weights, adam.init(weights)
    losses = []
    for i, x in enumerate(batches):
        if i == 2:
            with ocp.StandardCheckpointer() as store:
                store.save(tmp_path / "two", jax.tree.leaves(state))
        *state, loss = step(*state, x)
        losses.append(loss)

    _, _, other = fresh()
    empty = other, adam.init(other)
    with ocp.StandardCheckpointer() as store:
        leaves = store.restore(tmp_path / "two", jax.tree.leaves(empty))
    again = jax.tree.unflatten(jax.tree.structure(empty), leaves)
    for x, expected in zip(batches[2:], losses[2:], strict=True):
        *again, loss = step(*again, x)
        assert loss == expected
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(list(state)), strict=True):
        assert np.array_equal(a, b)
