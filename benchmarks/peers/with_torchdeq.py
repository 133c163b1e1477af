"""torchdeq: batched solvers with a relative stopping rule per sample, applied to the worst of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchdeq.solver import anderson_solver, broyden_solver
from torchdeq.solver.fp_iter import fixed_point_iter

from deqcore.bench.harness import Contender, Harness, Ready, SolveFunction, SolveOutcome


class TorchDEQ(Contender):
    """One of its solvers, with its own defaults except for budget and tolerance."""

    library = "torchdeq"

    def __init__(self, solver: str, function: Callable[..., Any]) -> None:
        self.solver = solver
        self.function = function

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        def run(rtol: float) -> SolveOutcome:
            with harness.quiet():
                value, _, _ = self.function(
                    lambda z: ready.f(z, ready.params, ready.inputs),
                    ready.z0,
                    max_iter=max(3, max_steps),
                    tol=rtol,
                    stop_mode="rel",
                )
            harness.block(value)
            return SolveOutcome(value)

        return run


CONTENDERS = [
    TorchDEQ("fixed_point_iter", fixed_point_iter),
    TorchDEQ("anderson", anderson_solver),
    TorchDEQ("broyden", broyden_solver),
]
