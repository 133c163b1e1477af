"""anchorax: Broyden's method cannot solve a float32 problem while JAX's double precision is enabled."""

from importlib.metadata import version

import jax
import jax.numpy as jnp
from anchorax import solvers

jax.config.update("jax_enable_x64", True)
print("anchorax", version("anchorax"), "jax", jax.__version__)
for dtype in (jnp.float64, jnp.float32):
    b, z0 = jnp.ones((1, 2), dtype), jnp.zeros((1, 2), dtype)
    f = lambda u, *_args, b=b, **_settings: 0.5 * u + b  # noqa: E731
    try:
        z, *_ = solvers.broyden(None, f, z0, u0=z0, eps=1e-4, max_depth=300, key=jax.random.PRNGKey(0))
        print(dtype.__name__, z[0], "(2 exactly)")
    except Exception as error:
        print(dtype.__name__, type(error).__name__, str(error).splitlines()[0])
