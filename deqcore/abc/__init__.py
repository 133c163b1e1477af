"""Contracts: what a backend, a solver and a backward strategy must offer.

Each contract has a file; its name is imported from here when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deqcore.lazy import lazy_names

if TYPE_CHECKING:
    from deqcore.abc.backend import Backend
    from deqcore.abc.backward import StepStrategy, Strategy
    from deqcore.abc.history import History
    from deqcore.abc.inverse_jacobian import InverseJacobian
    from deqcore.abc.kernels import FusedKernels
    from deqcore.abc.solver import Solver
    from deqcore.abc.stateful import StatefulStrategy
    from deqcore.abc.strategy_state import StrategyState

__all__ = [
    "Backend",
    "FusedKernels",
    "History",
    "InverseJacobian",
    "Solver",
    "StatefulStrategy",
    "StepStrategy",
    "Strategy",
    "StrategyState",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "deqcore.abc.backend": ["Backend"],
        "deqcore.abc.backward": ["StepStrategy", "Strategy"],
        "deqcore.abc.history": ["History"],
        "deqcore.abc.inverse_jacobian": ["InverseJacobian"],
        "deqcore.abc.kernels": ["FusedKernels"],
        "deqcore.abc.solver": ["Solver"],
        "deqcore.abc.stateful": ["StatefulStrategy"],
        "deqcore.abc.strategy_state": ["StrategyState"],
    },
)
