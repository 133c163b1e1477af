"""optimistix: with throw=False, NaN in one problem of a vmap raises an error in the gradients of all."""

from importlib.metadata import version

import jax
import jax.numpy as jnp
import optimistix

jax.config.update("jax_enable_x64", True)
print("optimistix", version("optimistix"), "lineax", version("lineax"))


def solve(b, method=optimistix.FixedPointIteration):
    solver = method(rtol=1e-6, atol=1e-6)
    f = lambda z, b: 0.5 * jnp.tanh(z) + b  # noqa: E731
    return optimistix.fixed_point(f, solver, jnp.zeros(2), b, throw=False, max_steps=100).value


b = jnp.array([[0.5, -0.25], [jnp.nan, 1.0]])
print("values:", jax.vmap(solve)(b).tolist())
for method in (optimistix.FixedPointIteration, optimistix.Newton):
    loss = lambda b, method=method: jax.vmap(lambda b: solve(b, method))(b).sum()  # noqa: E731
    try:
        gradients = jax.grad(loss)(b).tolist()
        print(method.__name__, "gradients:", gradients, "(numbers in the first row, NaN in the second, would be right)")
    except Exception as error:
        lines = [line for line in str(error).splitlines() if "Error" in line]
        print(method.__name__, "gradients:", type(error).__name__, lines[-1:])
print("alone:", jax.grad(lambda b: jax.vmap(solve)(b).sum())(b[:1]).tolist())
