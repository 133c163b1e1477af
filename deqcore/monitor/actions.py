"""Triggers at work: their events, and the settings that their actions change.

Actions change the resolved config of a call, so that they also apply to layers with their own config.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Final, TypeAlias

from deqcore import plugins
from deqcore.config import Config, override
from deqcore.errors import MonitorError, MonitorWarning
from deqcore.monitor.metrics import readable
from deqcore.monitor.sink import Event, Row
from deqcore.monitor.triggers import Condition, Transition, Trigger, TriggerState
from deqcore.options import options_of
from deqcore.solve.user_line import warn

Hook: TypeAlias = Callable[[Event], object]
_ACTIONS: Mapping[str, str] = {
    "warn": "",
    "raise": " The run is stopped.",
    "tighten": " The forward tolerance is tightened.",
    "refine": " The budget of the backward strategy is raised.",
    "exact": " The backward strategy is exact-ift from now on.",
    "hook": " The hook {hook!r} is called.",
    "retrain": " The model is marked for retraining.",
}

TIGHTEN_FACTOR: Final = 0.1
REFINE_FACTOR: Final = 2.0
# Options of built-in strategies that are budgets.
BUDGETS: Final = ("max_refine_vjps", "terms", "steps", "max_steps")
DEFAULT_TARGET: Final = 0.1  # where the strategy has a target and none is set

ORIGIN: Final = "the monitor"
CONFIG_ACTIONS: Final = frozenset({"tighten", "refine", "exact"})


@lru_cache(maxsize=256)
def apply_actions(
    config: Config, triggers: tuple[Trigger, ...], rtol: float | None = None, least: float = 0.0
) -> Config:
    """Return the config with the actions of `triggers` in force.

    Args:
        config: resolved settings.
        triggers: the active ones; only "tighten", "refine" and "exact" change settings.
        rtol: the value of `forward.rtol = "auto"`, or None if it is unknown.
        least: tolerance that the dtype can reach; "tighten" stops there.
    """
    for trigger in sorted(triggers, key=lambda trigger: trigger.action != "exact"):
        changes = overrides(config, trigger, rtol, least)
        config = override(config, changes, ORIGIN) if changes else config
    return config


def has_actions(config: Config) -> bool:
    """Return whether the config has the actions already, as `monitor.config` does: they must not apply twice."""
    return any(ORIGIN in config.origin(name) for name in ("forward.rtol", "backward.strategy", "backward.options"))


def overrides(config: Config, trigger: Trigger, rtol: float | None, least: float) -> dict[str, object]:
    """Return the settings that one action changes."""
    if trigger.action == "tighten":
        current = rtol if config.forward.rtol == "auto" else config.forward.rtol
        if current is None or float(current) <= least:
            return {}
        return {"forward__rtol": max(least, float(current) * (trigger.factor or TIGHTEN_FACTOR))}
    if trigger.action == "exact":
        return {} if config.backward.strategy == "exact-ift" else {"backward__strategy": "exact-ift"}
    if trigger.action == "refine":
        result = _refined(config, trigger.factor or REFINE_FACTOR)
        return {f"backward__options__{name}": value for name, value in result.items()}
    return {}


def _refined(config: Config, factor: float) -> dict[str, object]:
    """Return more steps and a smaller target, where the strategy has such options."""
    cls: Any = plugins.load("strategy", config.backward.strategy)
    given: Mapping[str, object] = config.backward.options
    current = {name: given.get(name, option.default) for name, option in options_of(cls).items()}
    more: dict[str, object] = {
        name: max(value + 1, round(value * factor))
        for name in BUDGETS
        if isinstance(value := current.get(name), int) and not isinstance(value, bool)
    }
    target = current.get("max_relative_error")
    if isinstance(target, float):
        more["max_relative_error"] = target / factor
    elif "max_relative_error" in current and "rtol" not in current:  # without a target an exact strategy has its own
        more["max_relative_error"] = DEFAULT_TARGET
    return more


class TriggerSet:
    """Shows rows to triggers and performs their actions.

    Args:
        triggers: the triggers, already checked.
        hooks: functions by name, for the action "hook".

    Attributes:
        retrain: the sentence of the event that set the retrain mark, or None.
        error: the error to raise once the records are safe: by the action "raise", by a hook, or by a warning that
            the user's filters turn into an error.
    """

    def __init__(self, triggers: Iterable[Trigger], hooks: Mapping[str, Hook]) -> None:
        self._states = [TriggerState(trigger) for trigger in triggers]
        self._hooks = hooks
        self.retrain: str | None = None
        self.error: Exception | None = None
        self.active: tuple[Trigger, ...] = ()

    @property
    def may_mark(self) -> bool:
        """Whether a trigger can set the retrain mark."""
        return any(state.trigger.action == "retrain" for state in self._states)

    def see(self, row: Row) -> list[Event]:
        """Show a row to all triggers and act on the transitions."""
        changes = [change for state in self._states if (change := state.see(row.values)) is not None]
        if changes:
            on = (state.trigger for state in self._states if state.active)
            self.active = tuple(trigger for trigger in on if trigger.action in CONFIG_ACTIONS)
        return [event for change in changes for event in self._act(change, row)]

    def _act(self, change: Transition, row: Row) -> list[Event]:
        trigger = change.trigger
        text = _sentence(change, row)
        kind = "fired" if change.fired else "cleared"
        event = Event(row.step, row.time, kind, text, trigger.metric, change.value, trigger.action)
        if not change.fired:
            return [event]
        try:
            self._notify(trigger, event)
        except Exception as error:
            self.error = self.error or error
        if trigger.action != "retrain" or self.retrain is not None:
            return [event]
        self.retrain = text
        return [replace(event, kind="retrain")]

    def _notify(self, trigger: Trigger, event: Event) -> None:
        if trigger.action == "hook":
            self._hooks[trigger.hook](event)
        elif trigger.action == "raise":
            raise MonitorError(event.message)
        else:
            warn(event.message, MonitorWarning)

    def apply(self, config: Config, rtol: float | None, least: float) -> Config:
        """Return the config with the actions in force."""
        return apply_actions(config, self.active, rtol, least) if self.active else config


def _sentence(change: Transition, row: Row) -> str:
    trigger = change.trigger
    where = f"step {row.step}" + (f", {row.name}" if row.name else "")
    if change.value is None:  # a trigger fires on a value only
        return f"{where}: {trigger.metric} was not measured since then: the earlier settings apply again."
    value = readable(trigger.metric, change.value)
    if change.fired:
        condition = Condition.parse(trigger.condition)
        limit = f"{condition.sign} {readable(trigger.metric, condition.threshold)}"
        what = f"{trigger.statistic} of {trigger.metric} over {trigger.window} = {value} {limit}"
        return f"{where}: {what}.{_ACTIONS[trigger.action].format(hook=trigger.hook)}"
    after = " The changes of the trigger are undone." if trigger.action in CONFIG_ACTIONS else ""
    return f"{where}: {trigger.statistic} of {trigger.metric} = {value} again.{after}"
