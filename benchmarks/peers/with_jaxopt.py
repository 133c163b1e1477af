"""jaxopt: one system with an absolute tolerance; the batch as it is, or one system per sample under vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jaxopt

from deqcore.bench.harness import Contender, Harness, Ready, SolveFunction, SolveOutcome
from deqcore.testing.problem import rebuild


class Jaxopt(Contender):
    """One of its solvers on the whole batch, or on each sample."""

    library = "jaxopt"

    def __init__(self, solver: str, make: Callable[..., Any], per_sample: bool = False) -> None:
        self.solver = f"{solver} (vmap)" if per_sample else solver
        self.make = make
        self.per_sample = per_sample

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        size = (ready.z0[0] if self.per_sample else ready.z0).size ** 0.5

        def solve(z0: Any, params: Any, inputs: Any, rtol: Any) -> Any:
            solver = self.make(ready.f, maxiter=max(1, max_steps), tol=rtol * size)
            result = solver.run(z0, params, inputs)
            return result.params, result.state.iter_num

        def single(z0: Any, params: Any, inputs: Any, rtol: Any) -> Any:
            value, steps = solve(z0[None], params, rebuild(inputs, lambda a: a[None]), rtol)
            return value[0], steps

        compiled = jax.jit(jax.vmap(single, in_axes=(0, None, 0, None)) if self.per_sample else solve)

        def run(rtol: float) -> SolveOutcome:
            value, steps = compiled(ready.z0, ready.params, ready.inputs, rtol)
            harness.block(value)
            return SolveOutcome(value, int(steps.max()))

        return run


def anderson(f: Callable[..., Any], **settings: Any) -> Any:
    """Build jaxopt's Anderson acceleration with its own defaults."""
    return jaxopt.AndersonAcceleration(f, **settings)


def iteration(f: Callable[..., Any], **settings: Any) -> Any:
    return jaxopt.FixedPointIteration(f, **settings)


def broyden(f: Callable[..., Any], **settings: Any) -> Any:
    return jaxopt.Broyden(lambda z, p, x: f(z, p, x) - z, **settings)


CONTENDERS = [
    Jaxopt("fixed-point", iteration),
    Jaxopt("anderson", anderson),
    Jaxopt("anderson", anderson, per_sample=True),
    Jaxopt("broyden", broyden),
]
