"""Plugins: registered solvers, strategies, backends, sinks, trainers, data, models and commands of any package.

A plugin author imports `hookimpl` and the records from here; the rest of deqcore calls the lookups. Names are imported
when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deqcore.lazy import lazy_names

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
    from deqcore.plugins.owners import backend_of, shares_arrays
    from deqcore.plugins.registration import load_deqfile, register, reset
    from deqcore.plugins.specs import (
        BackendSpec,
        CommandSpec,
        DataSpec,
        Kind,
        ModelSpec,
        PluginStatus,
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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "deqcore.options": ["Options"],
        "deqcore.plugins.hookspecs": ["hookimpl"],
        "deqcore.plugins.lookup": [
            "backends",
            "commands",
            "data",
            "is_installed",
            "load",
            "make_backend",
            "make_solver",
            "make_strategy",
            "models",
            "plugins_status",
            "sinks",
            "solvers",
            "spec",
            "strategies",
            "trainers",
        ],
        "deqcore.plugins.owners": ["backend_of", "shares_arrays"],
        "deqcore.plugins.registration": ["load_deqfile", "register", "reset"],
        "deqcore.plugins.specs": [
            "BackendSpec",
            "CommandSpec",
            "DataSpec",
            "Kind",
            "ModelSpec",
            "PluginStatus",
            "SinkSpec",
            "SolverSpec",
            "Spec",
            "StrategySpec",
            "TrainerSpec",
        ],
    },
)
