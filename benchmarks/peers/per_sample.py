"""Libraries whose solvers take one sample and a static tolerance: a batch goes through vmap."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache, partial
from typing import Any

import jax

from deqcore.bench.harness import Contender, Harness, Ready, SolveFunction, SolveOutcome
from deqcore.testing.problem import rebuild


class PerSample(Contender):
    """A solver under vmap."""

    recompiles = True

    @abstractmethod
    def one(self, f: Any, z0: Any, rtol: float, max_steps: int) -> tuple[Any, Any]:
        """Return the solution of `f(z) = z` from `z0` without a batch axis, and the steps taken."""

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        def single(rtol: float, z0: Any, params: Any, inputs: Any) -> Any:
            alone = rebuild(inputs, lambda a: a[None])
            return self.one(lambda z: ready.f(z[None], params, alone)[0], z0, rtol, max(1, max_steps))

        @cache  # each tolerance compiles again
        def compiled(rtol: float) -> Any:
            return jax.jit(jax.vmap(partial(single, rtol), in_axes=(0, None, 0)))

        def run(rtol: float) -> SolveOutcome:
            value, steps = compiled(rtol)(ready.z0, ready.params, ready.inputs)
            harness.block(value)
            return SolveOutcome(value, int(steps.max()))

        return run
