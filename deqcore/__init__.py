"""Fixed-point layers for every framework.

The public names are imported when they are first used: `import deqcore` itself costs a millisecond.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # type checkers take it for true; to import it from typing takes 9 of 10 ms
if TYPE_CHECKING:
    from deqcore import diagnostics as diagnostics
    from deqcore import equilibrium_cache as equilibrium_cache
    from deqcore import errors
    from deqcore import halting as halting
    from deqcore import monitor as monitor
    from deqcore.abc.backend import Backend
    from deqcore.abc.backward import StepStrategy, Strategy
    from deqcore.abc.history import History
    from deqcore.abc.inverse_jacobian import InverseJacobian
    from deqcore.abc.solver import Solver
    from deqcore.abc.stateful import StatefulStrategy
    from deqcore.abc.strategy_state import StrategyState
    from deqcore.api import fixed_point, get_backend, root, vjp
    from deqcore.config import Config, using
    from deqcore.implicit import Stepper, custom_fixed_point, custom_root
    from deqcore.solution import Solution
    from deqcore.stream import StreamResult, solve_stream
    from deqcore.types import AdjointReport, Capabilities, Status

    __version__: str

_HOME = {
    "AdjointReport": "deqcore.types",
    "Backend": "deqcore.abc.backend",
    "Capabilities": "deqcore.types",
    "Config": "deqcore.config",
    "History": "deqcore.abc.history",
    "InverseJacobian": "deqcore.abc.inverse_jacobian",
    "Solution": "deqcore.solution",
    "Solver": "deqcore.abc.solver",
    "Status": "deqcore.types",
    "StepStrategy": "deqcore.abc.backward",
    "StatefulStrategy": "deqcore.abc.stateful",
    "Stepper": "deqcore.implicit",
    "Strategy": "deqcore.abc.backward",
    "StreamResult": "deqcore.stream",
    "StrategyState": "deqcore.abc.strategy_state",
    "custom_fixed_point": "deqcore.implicit",
    "custom_root": "deqcore.implicit",
    "fixed_point": "deqcore.api",
    "get_backend": "deqcore.api",
    "root": "deqcore.api",
    "solve_stream": "deqcore.stream",
    "using": "deqcore.config",
    "vjp": "deqcore.api",
}

_MODULES = ("diagnostics", "equilibrium_cache", "errors", "halting", "monitor")

__all__ = [
    "AdjointReport",
    "Backend",
    "Capabilities",
    "Config",
    "History",
    "InverseJacobian",
    "Solution",
    "Solver",
    "StatefulStrategy",
    "Status",
    "StepStrategy",
    "Stepper",
    "Strategy",
    "StrategyState",
    "StreamResult",
    "__version__",
    "custom_fixed_point",
    "custom_root",
    "errors",
    "fixed_point",
    "get_backend",
    "root",
    "solve_stream",
    "using",
    "vjp",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        value: object = getattr(import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = import_module(f"deqcore.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("deqcore")
    else:
        raise AttributeError(f"module 'deqcore' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
