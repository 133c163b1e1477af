"""optimistix: with throw=False, NaN in one problem of a vmap raises an error in the gradients of all."""

from importlib.metadata import version

import jax
import jax.numpy as jnp
import optimistix

jax.config.update("jax_enable_x64", True)
print("optimistix", version("optimistix"), "lineax", version("lineax"))


def solve(b):
    solver = optimistix.FixedPointIteration(rtol=1e-6, atol=1e-6)
    f = lambda z, b: 0.5 * jnp.tanh(z) + b  # noqa: E731
    return optimistix.fixed_point(f, solver, jnp.zeros(2), b, throw=False, max_steps=100).value


b = jnp.array([[0.5, -0.25], [jnp.nan, 1.0]])
print("values:", jax.vmap(solve)(b).tolist())
try:
    print(
        "gradients:",
        jax.grad(lambda b: jax.vmap(solve)(b).sum())(b).tolist(),
        "(numbers in the first row, NaN in the second, would be right)",
    )
except Exception as error:
    print("gradients:", type(error).__name__, [line for line in str(error).splitlines() if "Error" in line][-1:])
print("alone:", jax.grad(lambda b: jax.vmap(solve)(b).sum())(b[:1]).tolist())
