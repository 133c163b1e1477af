"""optimistix: the whole batch is one system, one tolerance on the step."""

from __future__ import annotations

from typing import Any

import jax
import optimistix

from deqcore.bench.harness import Contender, Harness, Ready, SolveFunction, SolveOutcome


class FixedPoint(Contender):
    """`FixedPointIteration`, its one method."""

    library = "optimistix"
    solver = "fixed-point"

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        def solve(z0: Any, params: Any, inputs: Any, rtol: Any) -> Any:
            result = optimistix.fixed_point(
                lambda z, args: ready.f(z, *args),
                optimistix.FixedPointIteration(rtol=0.0, atol=rtol, norm=optimistix.rms_norm),
                z0,
                (params, inputs),
                max_steps=max(1, max_steps),
                throw=False,
            )
            return result.value, result.stats["num_steps"]

        compiled = jax.jit(solve)

        def run(rtol: float) -> SolveOutcome:
            value, steps = compiled(ready.z0, ready.params, ready.inputs, rtol)
            harness.block(value)
            return SolveOutcome(value, int(steps))

        return run


CONTENDERS = [FixedPoint()]
