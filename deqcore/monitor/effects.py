"""What the actions of triggers do to settings: each is a function from a config to a config.

They work on the config that a call resolved to, so that they reach layers with a config of their own, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from deqcore import plugins
from deqcore.config import Config, override
from deqcore.config.options import options_of
from deqcore.monitor.triggers import Trigger

TIGHTEN: Final = 0.1
REFINE: Final = 2.0
# Options of strategies by what more of them means: these names are shared by all that ship with deqcore.
BUDGETS: Final = ("max_refine_vjps", "terms", "steps", "max_steps")
TARGET: Final = 0.1  # where the strategy has a target and none is set

ORIGIN: Final = "the monitor"
CHANGES: Final = frozenset({"tighten", "refine", "exact"})


@lru_cache(maxsize=256)
def apply(config: Config, triggers: tuple[Trigger, ...], rtol: float | None = None, least: float = 0.0) -> Config:
    """The config with the actions of `triggers` in force.

    Args:
        config: resolved settings.
        triggers: those that are active; others than "tighten", "refine" and "exact" change nothing.
        rtol: what `forward.rtol = "auto"` means here, or None if that is not known.
        least: tolerance that the dtype can reach; "tighten" stops there.
    """
    for trigger in sorted(triggers, key=lambda each: each.action != "exact"):
        changes = overrides(config, trigger, rtol, least)
        config = override(config, changes, ORIGIN) if changes else config
    return config


def changed(config: Config) -> bool:
    """Whether actions are in this config already, as in `monitor.config`: they must not be applied twice."""
    return any(ORIGIN in config.origin(name) for name in ("forward.rtol", "backward.strategy", "backward.options"))


def overrides(config: Config, trigger: Trigger, rtol: float | None, least: float) -> dict[str, object]:
    """The settings that one action changes."""
    if trigger.action == "tighten":
        current = rtol if config.forward.rtol == "auto" else config.forward.rtol
        if current is None or float(current) <= least:
            return {}
        return {"forward__rtol": max(least, float(current) * (trigger.factor or TIGHTEN))}
    if trigger.action == "exact":
        return {} if config.backward.strategy == "exact-ift" else {"backward__strategy": "exact-ift"}
    if trigger.action == "refine":
        found = _refined(config, trigger.factor or REFINE)
        return {f"backward__options__{name}": value for name, value in found.items()}
    return {}


def _refined(config: Config, factor: float) -> dict[str, object]:
    """More steps and a smaller target, where the strategy has such options."""
    cls: Any = plugins.load("strategy", config.backward.strategy)
    given: Mapping[str, object] = config.backward.options
    current = {name: given.get(name, option.default) for name, option in options_of(cls).items()}
    more: dict[str, object] = {
        name: max(value + 1, round(value * factor))
        for name in BUDGETS
        if isinstance(value := current.get(name), int) and not isinstance(value, bool)
    }
    if "max_relative_error" in current:
        max_relative_error = current["max_relative_error"]
        more["max_relative_error"] = max_relative_error / factor if isinstance(max_relative_error, float) else TARGET
    return more
