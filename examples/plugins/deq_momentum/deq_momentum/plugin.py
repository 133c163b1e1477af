"""What the entry point names: hooks and records only."""

from collections.abc import Iterator

from deqcore.plugins import SolverSpec, hookimpl


@hookimpl
def deqcore_solvers() -> Iterator[SolverSpec]:
    yield SolverSpec("momentum", "deq_momentum.solver:Momentum", summary="heavy-ball iteration")
