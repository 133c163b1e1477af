"""Plugins: registered solvers, strategies, backends, sinks, trainers, data, models and commands of any package.

A plugin author imports `hookimpl` and the records from here; the rest of deqcore calls the lookups. Names are imported
when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from deqcore.options import Options
    from deqcore.plugins.hookspecs import hookimpl
    from deqcore.plugins.lookup import (
        backends,
        commands,
        data,
        is_installed,
        load,
        make_backend,
        make_solver,
        make_strategy,
        models,
        plugins_status,
        sinks,
        solvers,
        spec,
        strategies,
        trainers,
    )
    from deqcore.plugins.manager import PluginStatus
    from deqcore.plugins.owners import backend_of, shares_arrays
    from deqcore.plugins.registration import load_deqfile, register, reset
    from deqcore.plugins.specs import (
        BackendSpec,
        CommandSpec,
        DataSpec,
        Kind,
        ModelSpec,
        SinkSpec,
        SolverSpec,
        Spec,
        StrategySpec,
        TrainerSpec,
    )

__all__ = [
    "BackendSpec",
    "CommandSpec",
    "DataSpec",
    "Kind",
    "ModelSpec",
    "Options",
    "PluginStatus",
    "SinkSpec",
    "SolverSpec",
    "Spec",
    "StrategySpec",
    "TrainerSpec",
    "backend_of",
    "backends",
    "commands",
    "data",
    "hookimpl",
    "is_installed",
    "load",
    "load_deqfile",
    "make_backend",
    "make_solver",
    "make_strategy",
    "models",
    "plugins_status",
    "register",
    "reset",
    "shares_arrays",
    "sinks",
    "solvers",
    "spec",
    "strategies",
    "trainers",
]


_HOME: Final = {
    "Options": "deqcore.options",
    "PluginStatus": "deqcore.plugins.manager",
    "backend_of": "deqcore.plugins.owners",
    "hookimpl": "deqcore.plugins.hookspecs",
    "load_deqfile": "deqcore.plugins.registration",
    "register": "deqcore.plugins.registration",
    "reset": "deqcore.plugins.registration",
    "shares_arrays": "deqcore.plugins.owners",
}  # of the others, the records are in `specs` and the functions in `lookup`


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'deqcore.plugins' has no attribute {name!r}")
    home = _HOME.get(name) or f"deqcore.plugins.{'specs' if name[0].isupper() else 'lookup'}"
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
