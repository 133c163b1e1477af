"""jaxopt's page "Deep equilibrium model", in deqcore: train a layer on points in two rings."""

import equinox as eqx
import jax
import jax.numpy as jnp
from deqcore_jax.equinox import DEQ


class Cell(eqx.Module):
    """z ← tanh(W z + U x + b)."""

    w: eqx.nn.Linear
    u: eqx.nn.Linear

    def __init__(self, width, key):
        keys = jax.random.split(key)
        self.w = eqx.nn.Linear(width, width, use_bias=False, key=keys[0])
        self.u = eqx.nn.Linear(2, width, key=keys[1])

    def __call__(self, z, x):
        return jnp.tanh(0.3 * jax.vmap(self.w)(z) + jax.vmap(self.u)(x))

    def initial_state(self, x):
        return jnp.zeros((len(x), self.w.in_features))


class Model(eqx.Module):
    layer: DEQ
    head: eqx.nn.Linear

    def __init__(self, width, key):
        keys = jax.random.split(key)
        # the solver of the page: AndersonAcceleration with implicit_diff=True
        self.layer = DEQ(Cell(width, keys[0]), forward__solver="anderson", forward__rtol=1e-3)
        self.head = eqx.nn.Linear(width, 1, key=keys[1])

    def __call__(self, x):
        return jax.vmap(self.head)(self.layer(x))[:, 0]


def rings(count):
    keys = jax.random.split(jax.random.key(1), 2)
    label = jnp.arange(count) % 2
    angle = 2 * jnp.pi * jax.random.uniform(keys[0], (count,))
    radius = 0.5 + label + 0.1 * jax.random.normal(keys[1], (count,))
    return radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1), label


@eqx.filter_jit
def update(model, x, label):
    def loss(model):
        logit = model(x)
        return jnp.mean(jnp.logaddexp(0.0, logit) - label * logit)

    value, slope = eqx.filter_value_and_grad(loss)(model)
    return eqx.apply_updates(model, jax.tree.map(lambda g: -1.0 * g, slope)), value


def main(steps=80):
    x, label = rings(64)
    model = Model(16, jax.random.key(0))
    for _ in range(steps):
        model, _ = update(model, x, label)
    return jnp.mean((model(x) > 0) == label)


if __name__ == "__main__":
    print(f"accuracy {main():.2f}")
