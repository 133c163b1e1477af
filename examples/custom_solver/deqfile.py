"""Way 1: a plugin next to the config file, without a package. It runs because deq.toml asks for it."""

from collections.abc import Iterator

from deqcore.plugins import SolverSpec, hookimpl


@hookimpl
def deqcore_solvers() -> Iterator[SolverSpec]:
    yield SolverSpec("aitken", "aitken:Aitken", summary="damped iteration that learns its damping")
