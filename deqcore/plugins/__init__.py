"""Plugins: registered solvers, strategies, backends, sinks, trainers, data, models and commands of any package.

A plugin author imports `hookimpl` and the records from here; the rest of deqcore calls the lookups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deqcore.options import Options
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

if TYPE_CHECKING:
    from deqcore.plugins.hookspecs import hookimpl
    from deqcore.plugins.manager import PluginStatus

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


def __getattr__(name: str) -> object:
    # pluggy costs 0.03 s to import, and a program that uses built-ins only does not need it.
    if name == "hookimpl":
        from deqcore.plugins.hookspecs import hookimpl

        return hookimpl
    if name == "PluginStatus":
        from deqcore.plugins.manager import PluginStatus

        return PluginStatus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
