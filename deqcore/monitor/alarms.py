"""The triggers of a monitor at work: events, actions, and the settings that they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from deqcore.config import Config
from deqcore.errors import MonitorError
from deqcore.monitor import effects
from deqcore.monitor.sink import Event, Row
from deqcore.monitor.tell import tell
from deqcore.monitor.triggers import Change, Trigger, Watcher

Hook: TypeAlias = Callable[[Event], object]


class Alarms:
    """Watches rows and acts.

    Args:
        triggers: what to watch; they were checked.
        hooks: functions by name, for the action "hook".

    Attributes:
        retrain: the sentence of the event that set the retrain mark, or None.
        error: what is to be raised once the records are safe: by the action "raise", by a hook, or by a warning that
            the user's filters turn into an error.
    """

    def __init__(self, triggers: Iterable[Trigger], hooks: Mapping[str, Hook]) -> None:
        self._watchers = [Watcher(trigger) for trigger in triggers]
        self._hooks = hooks
        self.retrain: str | None = None
        self.error: Exception | None = None
        self.active: tuple[Trigger, ...] = ()

    @property
    def may_mark(self) -> bool:
        """Whether a trigger can set the retrain mark."""
        return any(watcher.trigger.action == "retrain" for watcher in self._watchers)

    def see(self, row: Row) -> list[Event]:
        """Show a row to all triggers, and act on what changes."""
        changes = [change for watcher in self._watchers if (change := watcher.see(row.values)) is not None]
        if changes:
            on = (watcher.trigger for watcher in self._watchers if watcher.active)
            self.active = tuple(trigger for trigger in on if trigger.action in effects.CHANGES)
        return [event for change in changes for event in self._act(change, row)]

    def _act(self, change: Change, row: Row) -> list[Event]:
        trigger = change.trigger
        text = _sentence(change, row)
        kind = "fired" if change.fired else "cleared"
        event = Event(row.step, row.time, kind, text, trigger.metric, change.value, trigger.action)
        if not change.fired:
            return [event]
        try:
            self._tell(trigger, event)
        except Exception as error:
            self.error = self.error or error
        if trigger.action != "retrain" or self.retrain is not None:
            return [event]
        self.retrain = text
        return [replace(event, kind="retrain")]

    def _tell(self, trigger: Trigger, event: Event) -> None:
        if trigger.action == "hook":
            self._hooks[trigger.hook](event)
        elif trigger.action == "raise":
            raise MonitorError(event.message)
        else:
            tell(event.message)

    def apply(self, config: Config, rtol: float | None, least: float) -> Config:
        """The config with the actions in force."""
        return effects.apply(config, self.active, rtol, least) if self.active else config


_ACTIONS: Mapping[str, str] = {
    "warn": "",
    "raise": " The run is stopped.",
    "tighten": " The forward tolerance is tightened.",
    "refine": " The backward strategy may spend more.",
    "exact": " The backward strategy is exact-ift from here on.",
    "hook": " The hook {hook!r} is called.",
    "retrain": " The model is marked for retraining.",
}


def _sentence(change: Change, row: Row) -> str:
    trigger = change.trigger
    where = f"step {row.step}" + (f", {row.name}" if row.name else "")
    if change.fired:
        what = f"{trigger.statistic} of {trigger.metric} over {trigger.window} = {change.value:.4g} {trigger.condition}"
        return f"{where}: {what}.{_ACTIONS[trigger.action].format(hook=trigger.hook)}"
    if change.value is None:
        return f"{where}: {trigger.metric} was not measured meanwhile: the earlier settings are tried again."
    after = " What the trigger changed is undone." if trigger.action in effects.CHANGES else ""
    return f"{where}: {trigger.statistic} of {trigger.metric} = {change.value:.4g} again.{after}"
