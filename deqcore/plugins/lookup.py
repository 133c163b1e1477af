"""Lookups for the rest of deqcore: from names to records, and from records to objects.

Built-ins are in a table; only a name that is missing there, or a listing, makes the manager load plugins. Every result
is cached, because these functions run at each call of `fixed_point`: a repeated lookup costs one dictionary access.
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from importlib.util import find_spec
from threading import RLock
from typing import TYPE_CHECKING, Any, Final, TypeVar

from deqcore import abc
from deqcore.errors import MissingFrameworkError, PluginError, UnknownNameError
from deqcore.options import Options, as_options, instantiate
from deqcore.plugins import specs
from deqcore.plugins.builtin import BUILTIN, SECTIONS

if TYPE_CHECKING:
    from deqcore.plugins.manager import Manager

S = TypeVar("S", bound=specs.Spec)
lock: Final = RLock()


@cache
def manager() -> Manager:
    """Return the one manager of this process, made when it is first needed: pluggy costs 0.03 s to import."""
    from deqcore.plugins.manager import Manager

    return Manager()


def backends() -> dict[str, specs.BackendSpec]:
    """Return all backends by name, built-in and plugged in."""
    return _all(specs.BackendSpec)


def solvers() -> dict[str, specs.SolverSpec]:
    """Return all solvers by name, built-in and plugged in."""
    return _all(specs.SolverSpec)


def strategies() -> dict[str, specs.StrategySpec]:
    """Return all backward strategies by name, built-in and plugged in."""
    return _all(specs.StrategySpec)


def sinks() -> dict[str, specs.SinkSpec]:
    """Return all sinks of the monitor by name, built-in and plugged in."""
    return _all(specs.SinkSpec)


def trainers() -> dict[str, specs.TrainerSpec]:
    """Return all training loops by name, built-in and plugged in."""
    return _all(specs.TrainerSpec)


def data() -> dict[str, specs.DataSpec]:
    """Return all data sets of studies by name, built-in and plugged in."""
    return _all(specs.DataSpec)


def models() -> dict[str, specs.ModelSpec]:
    """Return all models of studies by name, built-in and plugged in."""
    return _all(specs.ModelSpec)


def commands() -> dict[str, specs.CommandSpec]:
    """Return all subcommands by name, built-in and plugged in."""
    return _all(specs.CommandSpec)


def plugins_status() -> list[specs.PluginStatus]:
    """Return the status of every plugin. Loads them all; never raises."""
    with lock:
        return manager().statuses()


def _all(record: type[S]) -> dict[str, S]:
    with lock:
        offers = manager().offers(record.kind)
    entries = {**BUILTIN[record.kind], **{name: _only(record.kind, name, offer) for name, offer in offers.items()}}
    return {name: entry for name, entry in entries.items() if isinstance(entry, record)}


def _only(kind: specs.Kind, name: str, offered: list[tuple[specs.Spec, str]]) -> specs.Spec:
    if len(offered) > 1:
        titles = " and ".join(title for _, title in offered)
        raise PluginError(
            f"Two plugins offer the {kind} {name!r}: {titles}. Uninstall one of them, or name one in "
            f"DEQCORE_DISABLE_PLUGINS."
        )
    return offered[0][0]


@lru_cache(maxsize=256)
def spec(kind: specs.Kind, name: str) -> specs.Spec:
    """Return the record registered under a name.

    Args:
        kind: the kind of record, such as "solver".
        name: its registered name.

    Raises:
        UnknownNameError: the name is not registered; the message lists the plugins that could not be loaded, and why.
        PluginError: two plugins registered it.
    """
    built_in = BUILTIN[kind].get(name)
    if built_in is not None:
        return built_in
    with lock:
        offers = manager().offers(kind)
        broken = manager().broken()
    if name in offers:
        return _only(kind, name, offers[name])
    hint = "".join(f" The plugin {status.name!r} is broken: {status.reason}" for status in broken)
    raise UnknownNameError.of(kind, name, [*BUILTIN[kind], *offers], hint)


@lru_cache(maxsize=256)
def load(kind: specs.Kind, name: str) -> object:
    """Import the target that is registered under a name.

    Raises:
        UnknownNameError: the name is not registered.
        MissingFrameworkError: the framework of this backend or trainer is not installed; names the extra.
        PluginError: two plugins registered it, or its target cannot be imported.
    """
    record = spec(kind, name)
    backend = spec("backend", record.backend) if isinstance(record, specs.TrainerSpec) else record
    if isinstance(backend, specs.BackendSpec) and backend.package and not is_installed(backend.package):
        raise MissingFrameworkError.of(backend.name, backend.package, backend.extra)
    try:
        return _import(record.target)
    except (Exception, SystemExit) as error:  # a script that ends itself, too
        raise PluginError(
            f"The {kind} {name!r} has the target {record.target!r}, which cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error


def _import(target: str) -> object:
    module, _, attribute = target.partition(":")
    target_object: object = operator.attrgetter(attribute)(importlib.import_module(module))
    return target_object


def _function(target: str) -> Callable[[object], Any]:
    function = _import(target)
    if not callable(function):
        raise PluginError(f"{target} must be a function of one argument (got {function!r}).")
    return function


def contexts() -> list[Callable[[object], AbstractContextManager[object]]]:
    """Return the contexts that `deqcore.using` enters: those of the backends whose framework is imported."""
    imported = [record for record in _known_backends() if record.package in sys.modules]
    return [_function(record.context) for record in imported if record.context]


def load_compilers() -> None:
    """Import what backends have for compilers that are imported."""
    for record in _known_backends():
        if record.compiler is not None and record.compiler[0] in sys.modules:
            importlib.import_module(record.compiler[1])


def _known_backends() -> list[specs.BackendSpec]:
    """Return the backends that are known so far: a program that uses built-ins only never pays for discovery."""
    offered: Iterable[specs.Spec] = BUILTIN["backend"].values()
    if manager.cache_info().currsize:
        offered = backends().values()
    return [record for record in offered if isinstance(record, specs.BackendSpec)]


def check_section(name: str, section: Mapping[str, object]) -> None:
    """Find the mistakes in a section of a config that the core does not read, such as `[monitor]`.

    Raises:
        ConfigError: a setting is unknown, or a value does not fit.
    """
    if name in SECTIONS:
        _function(SECTIONS[name])(section)


def is_installed(package: str) -> bool:
    """Return whether a package could be imported, without importing it."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def make_solver(name: str, options: Mapping[str, object] | None = None) -> abc.Solver:
    """Return an instance of a registered solver; the same one for the same options.

    Args:
        name: its registered name.
        options: fields of its dataclass.

    Raises:
        UnknownNameError: the name is not registered.
        ConfigError: an option is unknown, of another type or out of range.
        PluginError: the plugin that offers it is broken.
    """
    return _make_solver(name, as_options(f"The solver {name!r}", options))


def make_backend(name: str) -> abc.Backend:
    """Return a new instance of a registered backend.

    Raises:
        UnknownNameError: the name is not registered.
        MissingFrameworkError: its framework is not installed.
        PluginError: the plugin that offers it is broken, or its class is not a complete backend.
    """
    from deqcore.plugins.validate import check_parts

    cls = _class("backend", name, abc.Backend)
    check_parts(f"backend {name!r}", cls)
    made: abc.Backend = cls()
    if not hasattr(made, "linalg"):
        raise PluginError(
            f"The backend {name!r} must have its parts. Call super().__init__() in {cls.__qualname__}.__init__."
        )
    return made


def make_strategy(name: str, options: Mapping[str, object] | None = None) -> abc.Strategy | abc.StepStrategy:
    """Return an instance of a registered backward strategy; the same one for the same options.

    Args:
        name: its registered name.
        options: fields of its dataclass.

    Raises:
        UnknownNameError: the name is not registered.
        ConfigError: an option is unknown, of another type or out of range.
        PluginError: the plugin that offers it is broken.
    """
    return _make_strategy(name, as_options(f"The strategy {name!r}", options))


@lru_cache(maxsize=256)
def _make_solver(name: str, options: Options) -> abc.Solver:
    made: abc.Solver = instantiate(f"solver {name!r}", _class("solver", name, abc.Solver), options)
    return made


@lru_cache(maxsize=256)
def _make_strategy(name: str, options: Options) -> abc.Strategy | abc.StepStrategy:
    cls = _class("strategy", name, abc.Strategy, abc.StepStrategy)
    made: abc.Strategy | abc.StepStrategy = instantiate(f"strategy {name!r}", cls, options)
    return made


def _class(kind: specs.Kind, name: str, *bases: type) -> type[Any]:
    from deqcore.plugins.validate import fulfils

    return fulfils(f"{kind} {name!r}", load(kind, name), *bases)


def forget() -> None:
    """Empty the caches: the meaning of a name may have changed."""
    for cached in (spec, load, _make_solver, _make_strategy):
        cached.cache_clear()
