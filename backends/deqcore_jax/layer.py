"""The common part of the layers for flax and equinox."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from deqcore.api import fixed_point
from deqcore.errors import ConfigError
from deqcore.halting import Rule, until
from deqcore.layer import LayerSettings, explain_arguments, shape_unknown
from deqcore.solution import Solution


def check_cell(cell: Any) -> Any:
    """Return the cell, or raise an error that says what a cell is."""
    if not callable(cell):
        raise ConfigError.bad_value("The layer", "cell", cell, "a module or a function cell(z, *inputs)")
    return cell


def initial_state(cell: Any, inputs: tuple[Any, ...]) -> Any:
    """Return the cell's own initial state, or zeros like the first input."""
    if hasattr(cell, "initial_state"):
        return cell.initial_state(*inputs)
    if not inputs:
        raise shape_unknown()
    return jax.tree.map(jnp.zeros_like, inputs[0])


def solve(
    cell: Any,
    settings: LayerSettings,
    training: bool,
    z0: Any,
    inputs: tuple[Any, ...],
    overrides: Mapping[str, object],
    rule: Rule | None = None,
) -> Solution:
    """Solve for a layer; `overrides` win over its settings, `rule` says when a sample halts."""
    config, own = settings.call(training)
    start = initial_state(cell, inputs) if z0 is None else z0
    f = cell if rule is None else until(cell, rule)
    with explain_arguments(cell, inputs, type(cell).__name__):
        return fixed_point(f, start, *inputs, config=config, **(own | dict(overrides)))


def trajectory(
    cell: Any, settings: LayerSettings, training: bool, z0: Any, inputs: tuple[Any, ...], steps: Sequence[int]
) -> list[Any]:
    """Return the states after these step counts, each continued from the one before, and the solution."""
    counts = [0, *steps]
    if not steps or any(b <= a for a, b in pairwise(counts)):
        raise ConfigError.bad_value("trajectory", "steps", list(steps), "increasing positive step counts")
    config, own = settings.call(training)
    start = initial_state(cell, inputs) if z0 is None else z0
    stops = [{"forward__max_steps": b - a, "forward__on_failure": "ignore"} for a, b in pairwise(counts)]
    states, state = [], None
    for stop in [*stops, {}]:
        with explain_arguments(cell, inputs, type(cell).__name__):
            solution = fixed_point(cell, start, *inputs, config=config, state=state, **(own | stop))
        state = solution.state
        states.append(solution.value)
    return states
