"""banax (Python 3.12 and later): solvers of one state with a relative stopping rule; a batch goes through vmap."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
from banax import solver as solvers
from banax.adjoint import JFB

from deqcore.bench.harness import Contender, Harness, Outcome, Ready, Solve
from deqcore.testing.problem import rebuild


class Banax(Contender):
    """One of its solvers under vmap."""

    library = "banax"
    recompiles = True

    def __init__(self, solver: str, **settings: Any) -> None:
        self.solver = solver.lower()
        self.make = getattr(solvers, solver)
        self.settings = settings

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> Solve:
        def single(rtol: float, z0: Any, params: Any, inputs: Any) -> Any:
            one = rebuild(inputs, lambda a: a[None])
            find = JFB(solver=self.make(rtol=rtol, max_steps=max(1, max_steps), **self.settings))
            found = find(lambda z: ready.f(z[None], params, one)[0], z0)
            return found.value, found.stats.steps

        @cache  # its tolerance is static: each compiles again
        def compiled(rtol: float) -> Any:
            return jax.jit(jax.vmap(partial(single, rtol), in_axes=(0, None, 0)))

        def run(rtol: float) -> Outcome:
            value, steps = compiled(rtol)(ready.z0, ready.params, ready.inputs)
            harness.block(value)
            return Outcome(value, int(steps.max()))

        return run


CONTENDERS = [Banax("Anderson"), Banax("Broyden", history_size=50)]
