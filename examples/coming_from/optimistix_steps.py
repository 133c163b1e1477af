"""optimistix' page on manual stepping, in deqcore: your own loop drives the solve."""

import jax
import jax.numpy as jnp

import deqcore


def fn(y, a):
    return a * jnp.cos(y)


def by_hand(y0, a, watch=print):
    """Step, look, step again: solver.init, solver.step, solver.terminate."""
    stepper = deqcore.Stepper(fn, overrides={"forward__solver": "anderson", "forward__rtol": 1e-6})
    solution = stepper.init(y0, a)
    step = jax.jit(stepper.update)
    while not bool(solution.converged.all()):
        watch(f"after {int(solution.steps.max())} steps: residual {float(solution.residual.max()):.1e}")
        solution = step(solution, a)
    return solution


def debugged(y0, a, watch=print):
    """jax.disable_jit(): f runs on values, so that it can print, branch and stop in a debugger."""

    def talkative(y, a):
        watch(f"f at {float(y[0, 0]):.6f}")
        return fn(y, a)

    with jax.disable_jit():
        return deqcore.fixed_point(talkative, y0, a, forward__rtol=1e-6)


def main(watch=print):
    y0, a = jnp.ones((2, 1)), 0.5
    return by_hand(y0, a, watch), debugged(y0, a, watch)


if __name__ == "__main__":
    stepped, debugged_ = main()
    print(stepped)
