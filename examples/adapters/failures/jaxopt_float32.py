"""jaxopt: Anderson acceleration cannot solve a float32 problem while JAX's double precision is enabled."""

from importlib.metadata import version

import jax
import jax.numpy as jnp
import jaxopt

jax.config.update("jax_enable_x64", True)
print("jaxopt", version("jaxopt"), "jax", jax.__version__)
for dtype in (jnp.float64, jnp.float32):
    b = jnp.ones(2, dtype)
    try:
        solver = jaxopt.AndersonAcceleration(lambda z, b: 0.5 * z + b, tol=1e-4, maxiter=300)
        print(dtype.__name__, solver.run(jnp.zeros(2, dtype), b).params, "(2 exactly)")
    except Exception as error:
        print(dtype.__name__, type(error).__name__, str(error).splitlines()[0])
