"""optimistix' first page and its page on fixed points, in deqcore."""

import jax
import jax.numpy as jnp

import deqcore
from deqcore.halting import Within, until


def euler(y0, dt):
    """Take an implicit Euler step of dy/dt = tanh(y): optx.fixed_point(fn, optx.Newton(rtol=1e-5, atol=1e-5), y0)."""
    return deqcore.fixed_point(
        lambda y, y0, dt: y0 + dt * jnp.tanh(y),
        y0,
        y0,
        dt,
        backend="jax",  # y0 may be a Python number
        forward__solver="newton-krylov",
        forward__rtol=1e-6,
        forward__batch=False,
    ).value


def with_aux(y0, a):
    """Replace optx.fixed_point(fn, solver, y0, a, has_aux=True)."""

    def fn(y, a):
        return a * jnp.cos(y), {"energy": jnp.sum(y**2)}

    return deqcore.fixed_point(fn, y0, a, has_aux=True, forward__rtol=1e-6, forward__batch=False)


def largest(y):
    """optx.max_norm."""
    return jnp.max(jnp.abs(y))


def by_max_norm(y0, a):
    """optx.FixedPointIteration(rtol=0, atol=1e-2, norm=optx.max_norm)."""
    fn = until(lambda y, a: 0.5 * y + a, Within(largest, atol=1e-2))
    return deqcore.fixed_point(fn, y0, a, forward__solver="picard", forward__rtol=0.0, forward__batch=False)


def main():
    y1 = euler(1.0, 0.1)
    slope = jax.grad(euler, argnums=1)(1.0, 0.1)
    # throw=False: a failed solve has a status, and the best iterate
    failed = deqcore.fixed_point(
        lambda y: 2.0 * y + 1.0,
        jnp.ones(2),
        forward__solver="picard",
        forward__max_steps=5,
        forward__on_failure="ignore",
        forward__batch=False,
    )
    return y1, slope, with_aux(jnp.ones(2), 0.5), by_max_norm(jnp.zeros(2), jnp.array([0.5, 1.0])), failed


if __name__ == "__main__":
    y1, slope, aux, stopped, failed = main()
    print(f"y(0.1) = {y1:.6f}, dy/ddt = {slope:.6f}")
    print(f"aux {aux.aux}, stopped after {stopped.steps} steps")
    print(failed)
