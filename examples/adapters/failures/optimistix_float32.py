"""optimistix: a float32 problem cannot be solved while JAX's double precision is enabled."""

from importlib.metadata import version

import jax
import jax.numpy as jnp
import optimistix

jax.config.update("jax_enable_x64", True)
print("optimistix", version("optimistix"), "jax", jax.__version__)
for dtype in (jnp.float64, jnp.float32):
    b = jnp.ones(2, dtype)
    solver = optimistix.FixedPointIteration(rtol=1e-4, atol=1e-4)
    try:
        z = optimistix.fixed_point(lambda z, b: 0.5 * z + b, solver, jnp.zeros(2, dtype), b, throw=False).value
        print(dtype.__name__, z, "(2 exactly)")
    except Exception as error:
        print(dtype.__name__, type(error).__name__, str(error).splitlines()[0])
