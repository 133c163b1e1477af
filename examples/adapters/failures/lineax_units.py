"""lineax: GMRES with a right-hand side in other units returns 0 or NaN."""

from importlib.metadata import version

import jax
import jax.numpy as jnp
import lineax

print("lineax", version("lineax"), "jax", jax.__version__)
a = jnp.array([[1.0, 0.3], [-0.2, 0.8]])
operator = lineax.MatrixLinearOperator(a)
for unit in (1.0, 1e-30, 1e30):
    b = unit * jnp.array([1.0, 2.0])
    solver = lineax.GMRES(rtol=1e-5, atol=0.0)
    solution = lineax.linear_solve(operator, b, solver, throw=False)
    success = bool(solution.result == lineax.RESULTS.successful)
    print(f"unit {unit:g}: {(solution.value / unit).tolist()}, success: {success}")
print("exactly:", jnp.linalg.solve(a, jnp.array([1.0, 2.0])).tolist())
