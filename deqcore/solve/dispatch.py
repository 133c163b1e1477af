"""From settings and arguments to a plan: backend, solver, strategy and tolerances."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any

from deqcore import config as settings
from deqcore import plugins
from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy
from deqcore.abc.strategy_state import StrategyState
from deqcore.config import Config
from deqcore.config.sections import LARGEST
from deqcore.errors import (
    BackendMismatchError,
    ConfigError,
    DtypeToleranceWarning,
    InitialIterateError,
    PluginError,
    StrategyError,
)
from deqcore.linear.norms import default_rtol
from deqcore.solution import Solution
from deqcore.solve.flatten import RavelSpec
from deqcore.solve.observer import Observer, Solve, observer
from deqcore.solve.plan import Plan
from deqcore.solve.user_line import warn
from deqcore.types import Array, StoppingCriteria, Tree

_instances: dict[str, Backend] = {}


def backend_named(name: str) -> Backend:
    """Return the backend of this name, one object per name."""
    if name not in _instances:
        _instances[name] = plugins.make_backend(name)
    return _instances[name]


def plan_call(
    config: Config | None,
    overrides: Mapping[str, object],
    z0: Tree,
    args: tuple[Any, ...],
    memory: StrategyState | None = None,
) -> Plan:
    """Resolve the settings of one call for the initial iterate z0. Not public: for other parts of deqcore."""
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
    if space.units > 1 and forward.coupled:
        solver = solver.for_coupled_units()
    like = space.leaves(z0)[0] if not space.complex else space.ravel(z0)
    control = _criteria(resolved, scalars, backend, like)._replace(units=space.units if forward.coupled else 1)
    if memory is not None and not backend.capabilities.eager:
        raise StrategyError(
            f"strategy_state must be None for the backend {backend.name!r}, whose state is an argument of the compiled "
            f"step (got a StrategyState). Use deqcore_jax.strategy_state.carrying."
        )
    step = _step(resolved, scalars, backend)
    observed = None if watcher is None else partial(_pass_on, watcher, resolved)
    return Plan(
        forward, backward, backend, solver, strategy, control, space, resolved.is_set, observed, memory, step=step
    )


def _pass_on(
    watcher: Observer, config: Config, solution: Solution, seconds: float, f: Any, z0: Tree, args: Any
) -> None:
    """Pass a call that has returned to the observer."""
    watcher.solved(Solve(solution, config, seconds, f, z0, args))


def _step(config: Config, scalars: Mapping[str, object], backend: Backend) -> Any:
    """Return the training step, a number or a scalar of the framework."""
    step: Any = scalars.get("backward__step", config.backward.step)
    if "backward__step" in scalars and not backend.is_traced(step) and not 0 <= int(step) <= LARGEST:
        raise ConfigError.bad_value("backward", "step", int(step), f"an integer from 0 to {LARGEST}")
    return step


def _criteria(config: Config, scalars: Mapping[str, object], backend: Backend, like: Array) -> StoppingCriteria:
    forward = config.forward
    rtol: Any = scalars.get("forward__rtol", forward.rtol)
    atol: Any = scalars.get("forward__atol", forward.atol)
    max_steps: Any = scalars.get("forward__max_steps", forward.max_steps)
    if isinstance(rtol, str):  # "auto"
        rtol = default_rtol(backend, like)
    for name, value in (("rtol", rtol), ("atol", atol), ("max_steps", max_steps)):
        if f"forward__{name}" in scalars and not backend.is_traced(value):
            number = float(value)
            if not (number >= 0 and number < float("inf")):
                raise ConfigError.bad_value("forward", name, number, "a finite number >= 0")
            if name == "max_steps" and number > LARGEST:
                raise ConfigError.bad_value("forward", name, value, f"a number of at most {LARGEST}")
    if isinstance(rtol, float) and 0.0 < rtol < 0.5 * backend.eps(like) and isinstance(atol, float) and atol == 0:
        warn(
            f"forward.rtol = {rtol:g} is below what {backend.dtype_name(like)} can reach (about "
            f"{backend.eps(like):.1g}), so the solve will end as STALLED or MAX_STEPS. Use a wider dtype or a larger "
            f"rtol.",
            DtypeToleranceWarning,
        )
    return StoppingCriteria(
        rtol=backend.numbers.as_scalar(rtol, like),
        atol=backend.numbers.as_scalar(atol, like),
        max_steps=backend.numbers.as_scalar(max_steps, like),
        check_every=forward.check_every,
        patience=forward.patience,
    )


def pick_backend(config: Config, z0: Tree, args: tuple[Any, ...]) -> Backend:
    """Return the backend of the arrays in z0; the config may only confirm it."""
    arrays = [leaf for leaf in plain_leaves(z0) if plugins.backend_of(leaf) is not None]
    owner = plugins.backend_of(arrays[0]) if arrays else None
    if owner is None:
        owner = next((name for leaf in plain_leaves(args) if (name := plugins.backend_of(leaf)) is not None), None)
    if owner is None:
        if config.backend == "auto":
            raise InitialIterateError(
                f"The initial iterate z0 must hold arrays of numpy, torch or jax (got a {type(z0).__name__} without "
                f"one). Pass such arrays, or name the backend in the config."
            )
        owner = config.backend
    if config.backend not in ("auto", owner) and arrays and plugins.shares_arrays(config.backend, arrays):
        owner = config.backend
    if config.backend not in ("auto", owner):
        plugins.spec("backend", config.backend)  # an unknown name is the first error to report
        raise BackendMismatchError.of(config.backend, config.origin("backend"), owner)
    others = {name for leaf in plain_leaves(args) if (name := plugins.backend_of(leaf)) not in (None, "numpy", owner)}
    if others:
        raise BackendMismatchError.of(owner, "the initial iterate z0", ", ".join(sorted(str(name) for name in others)))
    return backend_named(owner)


def plain_leaves(tree: Tree) -> Iterator[Any]:
    """Yield the leaves of plain containers and dataclasses; no framework is needed."""
    if isinstance(tree, (list, tuple)):
        for value in tree:
            yield from plain_leaves(value)
    elif _is_mapping(type(tree)):
        for value in tree.values():
            yield from plain_leaves(value)
    elif is_dataclass(tree) and not isinstance(tree, type) and plugins.backend_of(tree) is None:
        for field in fields(tree):
            yield from plain_leaves(getattr(tree, field.name, None))
    else:
        yield tree


# Asked for each leaf of each call, so remembered: a check against an abstract class takes half a microsecond.
_is_mapping: Callable[[Any], bool] = cache(lambda kind: issubclass(kind, Mapping))


def _with_estimate() -> list[str]:
    """Return the names of the solvers that keep an estimate, without those that cannot be imported."""
    names = []
    for name in plugins.solvers():
        with suppress(PluginError):
            if getattr(plugins.load("solver", name), "has_estimate", False):
                names.append(name)
    return names
