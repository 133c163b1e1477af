"""Registers the adapters of the libraries that are installed."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Final

from deqcore.plugins import SolverSpec, StrategySpec, hookimpl

ADAPTERS: Final = {
    "deqcore": {
        "deqcore-auto": "Auto",
        "deqcore-picard": "Deqcore",
        "deqcore-anderson": "Anderson",
        "deqcore-broyden": "Broyden",
        "deqcore-newton-krylov": "NewtonKrylov",
    },
    "torchdeq": {"torchdeq-picard": "TorchDEQ", "torchdeq-anderson": "Anderson", "torchdeq-broyden": "Broyden"},
    "jaxopt": {"jaxopt-picard": "FixedPoint", "jaxopt-anderson": "Anderson", "jaxopt-broyden": "Broyden"},
    "optimistix": {"optimistix-picard": "FixedPoint", "optimistix-newton": "Newton"},
    "scipy": {
        "scipy-hybr": "Root",
        "scipy-krylov": "Krylov",
        "scipy-anderson": "Anderson",
        "scipy-broyden1": "Broyden",
    },
    "xitorch": {"xitorch-broyden1": "Equilibrium", "xitorch-anderson": "Anderson"},
    "anchorax": {"anchorax-picard": "Picard", "anchorax-anderson": "Anderson", "anchorax-broyden": "Broyden"},
}
"""Library -> registered name -> class in `with_<library>.py`."""


@hookimpl
def deqcore_solvers() -> Iterator[SolverSpec]:
    for library, solvers in ADAPTERS.items():
        if find_spec(library) is not None:
            for name, cls in solvers.items():
                yield SolverSpec(name, f"with_{library}:{cls}", summary=f"{library}'s, as a whole solve")
    if find_spec("torch") is not None:
        yield SolverSpec("checkout", "with_checkout:Checkout", summary="a function of published code, see --path")


@hookimpl
def deqcore_strategies() -> Iterator[StrategySpec]:
    if find_spec("lineax") is not None:
        yield StrategySpec(
            "lineax-gmres", "with_lineax:LineaxGMRES", summary="lineax' GMRES on the whole batch; JAX only"
        )
