"""What the entry point names: hooks and records only. The solver is imported when it is first used."""

from collections.abc import Iterator

from deqcore.plugins import SolverSpec, hookimpl


@hookimpl
def deqcore_solvers() -> Iterator[SolverSpec]:
    yield SolverSpec("aitken", "deq_aitken.solver:Aitken", summary="damped iteration that learns its damping")
