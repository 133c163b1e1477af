"""jaxopt's page "Implicit differentiation", in deqcore: the gradient of a solver of your own."""

import jax
import jax.numpy as jnp

import deqcore


def objective(w, penalty, x, y):
    """Ridge regression."""
    return 0.5 * jnp.mean((x @ w - y) ** 2) + 0.5 * penalty * jnp.sum(w**2)


# @implicit_diff.custom_root(jax.grad(objective)); the settings are those of the backward pass
@deqcore.custom_root(
    jax.grad(objective), forward__batch=False, forward__rtol=1e-4, backward__options={"solver": "gmres", "rtol": 1e-6}
)
def ridge(w0, penalty, x, y):
    """Solve by a dense factorization, which ignores its start; any other solver would do."""
    gram = x.T @ x / len(y) + penalty * jnp.eye(x.shape[1])
    return jnp.linalg.solve(gram, x.T @ y / len(y))


# @implicit_diff.custom_fixed_point(step): the map of gradient descent has the same solution
def step(w, penalty, x, y):
    return w - 0.3 * jax.grad(objective)(w, penalty, x, y)


@deqcore.custom_fixed_point(step, forward__batch=False, forward__rtol=1e-4, backward__options={"rtol": 1e-6})
def descent(w0, penalty, x, y):
    """Solve by a loop that JAX cannot differentiate in reverse mode."""

    def moving(w):
        return jnp.linalg.norm(step(w, penalty, x, y) - w) > 1e-6 * jnp.linalg.norm(w)

    return jax.lax.while_loop(moving, lambda w: step(w, penalty, x, y), w0)


def data():
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (40, 3))
    return x, x @ jnp.array([1.0, -2.0, 0.5]) + 0.1 * jax.random.normal(keys[1], (40,))


def main():
    x, y = data()
    start, penalty = jnp.ones(3), 0.1
    by_root = jax.jacobian(ridge, argnums=1)(start, penalty, x, y)
    by_descent = jax.jacobian(descent, argnums=1)(start, penalty, x, y)
    return by_root, by_descent


if __name__ == "__main__":
    by_root, by_descent = main()
    print(f"dw/dpenalty by custom_root        {by_root}")
    print(f"dw/dpenalty by custom_fixed_point {by_descent}")
