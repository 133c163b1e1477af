"""The hooks that a plugin may implement. Each yields records, see `specs.py`; none imports a framework.

A plugin is a module (or an object) with functions marked `hookimpl`, found by an entry point in the group
`deqcore`:

    [project.entry-points.deqcore]
    mine = "deq_mine.plugin"
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import pluggy

from deqcore.plugins import specs

PROJECT: Final = "deqcore"
hookspec: Final = pluggy.HookspecMarker(PROJECT)
hookimpl: Final = pluggy.HookimplMarker(PROJECT)
"""Marks a function as the implementation of the hook of its name."""


@hookspec
def deqcore_backends() -> Iterable[specs.BackendSpec]:
    """Offer backends: other array frameworks.

    Example:
        >>> from deqcore.plugins import BackendSpec, hookimpl
        >>> @hookimpl
        ... def deqcore_backends():
        ...     yield BackendSpec("mlx", "deq_mlx.backend:MLXBackend", package="mlx", array_modules=("mlx",))
        >>> [spec.name for spec in deqcore_backends()]
        ['mlx']
    """
    raise NotImplementedError


@hookspec
def deqcore_solvers() -> Iterable[specs.SolverSpec]:
    """Offer solvers of `z = f(z)`.

    Example:
        >>> from deqcore.plugins import SolverSpec, hookimpl
        >>> @hookimpl
        ... def deqcore_solvers():
        ...     yield SolverSpec("momentum", "deq_momentum:Momentum", summary="heavy-ball iteration")
        >>> next(iter(deqcore_solvers())).summary
        'heavy-ball iteration'
    """
    raise NotImplementedError


@hookspec
def deqcore_strategies() -> Iterable[specs.StrategySpec]:
    """Offer backward strategies.

    Example:
        >>> from deqcore.plugins import StrategySpec, hookimpl
        >>> @hookimpl
        ... def deqcore_strategies():
        ...     return [StrategySpec("two", "deq_terms:Two"), StrategySpec("none", "deq_terms:Nothing")]
        >>> len(list(deqcore_strategies()))
        2
    """
    raise NotImplementedError


@hookspec
def deqcore_sinks() -> Iterable[specs.SinkSpec]:
    """Offer sinks of the monitor.

    Example:
        >>> from deqcore.plugins import SinkSpec, hookimpl
        >>> @hookimpl
        ... def deqcore_sinks():
        ...     yield SinkSpec("parquet", "deq_parquet:ParquetSink", summary="one row group per flush")
        >>> next(iter(deqcore_sinks())).target
        'deq_parquet:ParquetSink'
    """
    raise NotImplementedError


@hookspec
def deqcore_trainers() -> Iterable[specs.TrainerSpec]:
    """Offer training loops for studies, one per backend.

    Example:
        >>> from deqcore.plugins import TrainerSpec, hookimpl
        >>> @hookimpl
        ... def deqcore_trainers():
        ...     yield TrainerSpec("mlx", "deq_mlx.study:Trainer", backend="mlx")
        >>> next(iter(deqcore_trainers())).backend
        'mlx'
    """
    raise NotImplementedError


@hookspec
def deqcore_data() -> Iterable[specs.DataSpec]:
    """Offer data for studies, so that a config may say `data = ["mine"]`.

    Example:
        >>> from deqcore.plugins import DataSpec, hookimpl
        >>> @hookimpl
        ... def deqcore_data():
        ...     yield DataSpec("fashion", "deq_fashion:load", gives="image")
        >>> next(iter(deqcore_data())).gives
        'image'
    """
    raise NotImplementedError


@hookspec
def deqcore_models() -> Iterable[specs.ModelSpec]:
    """Offer models for studies, so that a config may say `models = ["mine"]`.

    Example:
        >>> from deqcore.plugins import ModelSpec, hookimpl
        >>> @hookimpl
        ... def deqcore_models():
        ...     yield ModelSpec("mixer", "deq_mixer:Mixer", summary="an MLP mixer as a cell")
        >>> next(iter(deqcore_models())).name
        'mixer'
    """
    raise NotImplementedError


@hookspec
def deqcore_commands() -> Iterable[specs.CommandSpec]:
    """Offer subcommands of `deqcore`.

    Example:
        >>> from deqcore.plugins import CommandSpec, hookimpl
        >>> @hookimpl
        ... def deqcore_commands():
        ...     yield CommandSpec("export", "deq_export.cli:app", summary="write a model to ONNX")
        >>> next(iter(deqcore_commands())).name
        'export'
    """
    raise NotImplementedError


HOOKS: Final[dict[specs.Kind, str]] = {
    "backend": "deqcore_backends",
    "solver": "deqcore_solvers",
    "strategy": "deqcore_strategies",
    "sink": "deqcore_sinks",
    "trainer": "deqcore_trainers",
    "data": "deqcore_data",
    "model": "deqcore_models",
    "command": "deqcore_commands",
}
