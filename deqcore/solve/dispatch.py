"""From settings and arguments to a plan: which backend, solver, strategy and tolerances."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from deqcore import config as settings
from deqcore import plugins
from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy
from deqcore.config import Config
from deqcore.config.sources import LARGEST
from deqcore.errors import BackendMismatchError, ConfigError, DtypeToleranceWarning, InitialIterateError, StrategyError
from deqcore.solve.flatten import RavelSpec
from deqcore.solve.observer import observer
from deqcore.solve.plan import Plan, user_stacklevel
from deqcore.types import Array, StoppingCriteria, Tree

_instances: dict[str, Backend] = {}


def backend_named(name: str) -> Backend:
    if name not in _instances:
        _instances[name] = plugins.make_backend(name)
    return _instances[name]


def plan_call(config: Config | None, overrides: Mapping[str, object], z0: Tree, args: tuple[Any, ...]) -> Plan:
    """Resolve the settings of one call for the initial iterate z0; for other parts of deqcore, no public name."""
    resolved, scalars = settings.resolve(config, overrides)
    backend = pick_backend(resolved, z0, args)
    watcher = observer()
    if watcher is not None:
        resolved = watcher.adjust(resolved, backend)
    forward, backward = resolved.forward, resolved.backward
    solver = plugins.make_solver(forward.solver, forward.options)
    strategy = plugins.make_strategy(backward.strategy, backward.options)
    if isinstance(strategy, Strategy):
        strategy = strategy.bind(plugins.make_solver)
        if strategy.wants_estimate() and not solver.has_estimate:
            raise StrategyError.needs_estimate(backward.strategy, forward.solver, _with_estimate())
    space = RavelSpec.of(backend, z0, forward.batch)
    like = backend.flatten(z0)[0][0]
    control = _criteria(resolved, scalars, backend, like)
    return Plan(resolved, backend, solver, strategy, control, space, watcher)


def _criteria(config: Config, scalars: Mapping[str, object], backend: Backend, like: Array) -> StoppingCriteria:
    forward = config.forward
    rtol: Any = scalars.get("forward__rtol", forward.rtol)
    atol: Any = scalars.get("forward__atol", forward.atol)
    max_steps: Any = scalars.get("forward__max_steps", forward.max_steps)
    if rtol == "auto" if isinstance(rtol, str) else False:
        rtol = backend.default_rtol(like)
    for name, value in (("rtol", rtol), ("atol", atol), ("max_steps", max_steps)):
        if name in {key.partition("__")[2] for key in scalars} and not backend.is_traced(value):
            number = float(value)
            if not (number >= 0 and number < float("inf")):
                raise ConfigError.bad_value("forward", name, number, "a finite number >= 0")
            if name == "max_steps" and number > LARGEST:
                raise ConfigError.bad_value("forward", name, value, f"a number of at most {LARGEST}")
    if isinstance(rtol, float) and 0.0 < rtol < 0.5 * backend.eps(like) and isinstance(atol, float) and atol == 0:
        warnings.warn(
            f"forward.rtol = {rtol:g} is below what {backend.dtype_name(like)} can reach (about "
            f"{backend.eps(like):.1g}): the solve will end as STALLED or MAX_STEPS. Use a wider dtype or a larger "
            f"rtol.",
            DtypeToleranceWarning,
            stacklevel=user_stacklevel(),
        )
    return StoppingCriteria(
        rtol=backend.as_scalar(rtol, like),
        atol=backend.as_scalar(atol, like),
        max_steps=backend.as_scalar(max_steps, like),
        check_every=forward.check_every,
        patience=forward.patience,
    )


def pick_backend(config: Config, z0: Tree, args: tuple[Any, ...]) -> Backend:
    """Return the backend whose arrays the state holds; the config may only confirm it."""
    arrays = [leaf for leaf in plain_leaves(z0) if plugins.backend_of(leaf) is not None]
    found = plugins.backend_of(arrays[0]) if arrays else None
    if found is None:
        found = next((name for leaf in plain_leaves(args) if (name := plugins.backend_of(leaf)) is not None), None)
    if found is None:
        if config.backend == "auto":
            raise InitialIterateError(
                f"The initial iterate z0 ({type(z0).__name__}) holds no array of a known framework: give arrays of numpy, "
                f"torch or jax, or name the backend in the config."
            )
        found = config.backend
    if config.backend not in ("auto", found) and arrays and plugins.shares_arrays(config.backend, arrays):
        found = config.backend
    if config.backend not in ("auto", found):
        plugins.spec("backend", config.backend)  # a name that nobody registered is told as such
        raise BackendMismatchError.of(config.backend, config.origin("backend"), found)
    others = {name for leaf in plain_leaves(args) if (name := plugins.backend_of(leaf)) not in (None, "numpy", found)}
    if others:
        raise BackendMismatchError.of(found, "the initial iterate z0", ", ".join(sorted(str(name) for name in others)))
    return backend_named(found)


def plain_leaves(tree: Tree) -> Iterator[Any]:
    """Yield leaves of plain containers, before any framework is known."""
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from plain_leaves(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from plain_leaves(value)
    else:
        yield tree


def _with_estimate() -> list[str]:
    names = []
    for name in plugins.solvers():
        cls: Any = plugins.load("solver", name)
        if cls.has_estimate:
            names.append(name)
    return names
