"""Triggers: a metric, a window, a condition, and what to do about it.

    [[monitor.triggers]]
    metric = "deq_uncertified_fraction"
    window = 20                  # measured values that the statistic is taken of
    statistic = "mean"           # mean | median | min | max | last
    condition = "> 0.05"
    action = "exact"             # warn | raise | tighten | refine | exact | hook | retrain
    until = "< 0.01"             # when it counts as over; default: the opposite, 20 % beyond the threshold
    hold = 200                   # values or solves that an action lasts at least

A trigger fires once, when its window is full and the condition holds; it fires again only after it was cleared. The
actions `tighten`, `refine` and `exact` change the settings of the monitored solves until then.

Hysteresis is threefold: `until` lies apart from `condition`, an action lasts `hold` solves, and the windows before and
after a change never mix. A metric that is not measured while the action is in force (an error estimate under
exact-IFT) cannot clear it: then the old settings are tried again after `hold` solves, and each failed trial doubles
the wait, up to 64-fold.
"""

from __future__ import annotations

import operator
import re
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from deqcore.errors import ConfigError, did_you_mean, listing
from deqcore.monitor.metrics import Metrics, mean

_CONDITION: Final = re.compile(r"\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
_COMPARE: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_STATISTIC: Final[Mapping[str, Callable[[list[float]], float]]] = {
    "mean": mean,
    "median": statistics.median,
    "min": min,
    "max": max,
    "last": lambda values: values[-1],
}
MARGIN: Final = 0.2
LONGEST: Final = 64


@dataclass(frozen=True)
class Condition:
    """A comparison with a number.

    Example:
        >>> Condition.parse("> 0.1")(0.2), str(Condition.parse("> 0.1").opposite())
        (True, '< 0.08')
    """

    sign: str
    threshold: float

    @classmethod
    def parse(cls, text: object, owner: str = "The trigger", option: str = "condition") -> Condition:
        """Read text such as "> 0.1".

        Raises:
            ConfigError: it is not a condition.
        """
        result = _CONDITION.fullmatch(text) if isinstance(text, str) else None
        if result is None:
            expected = "'<', '<=', '>' or '>=' and a number, such as '> 0.1',"
            raise ConfigError.bad_value(owner, option, text, expected)
        return cls(result[1], float(result[2]))

    def __call__(self, value: float) -> bool:
        """Return whether the value meets it."""
        return _COMPARE[self.sign](value, self.threshold)

    def opposite(self) -> Condition:
        """Return the condition of a value clearly on the other side: beyond the threshold by 20 % of it."""
        upper = self.sign in (">", ">=")
        gap = MARGIN * abs(self.threshold)
        sign = {">": "<", ">=": "<", "<": ">", "<=": ">"}[self.sign]
        if gap == 0.0:
            sign += "="
        return Condition(sign, self.threshold - gap if upper else self.threshold + gap)

    def __str__(self) -> str:
        return f"{self.sign} {self.threshold:g}"


@dataclass(frozen=True)
class Trigger:
    """What to watch and what to do.

    Attributes:
        metric: the name of a metric.
        condition: such as "> 0.1".
        action: what happens when the statistic meets the condition. "warn", "raise" (stops the run), "tighten" (the
            forward tolerance times `factor`), "refine" (more of what the backward strategy spends, by `factor`),
            "exact" (backward strategy exact-ift), "hook" (calls a function given to the monitor), "retrain" (sets
            the retrain mark, which stays).
        window: number of measured values in the statistic.
        statistic: of the window.
        until: when it is cleared; None: the opposite of the condition, 20 % beyond its threshold.
        hold: the least number of solves that an action lasts.
        factor: of "tighten" (below 1; default 0.1) and "refine" (above 1; default 2).
        hook: name of the function, for "hook".

    Raises:
        ConfigError: (when a Monitor is made) the metric is unknown, or an option does not fit the action.

    Example:
        >>> from deqcore.monitor import Trigger
        >>> trigger = Trigger("deq_unconverged_fraction", "> 0.05", "warn", window=50)
        >>> trigger.metric, trigger.statistic
        ('deq_unconverged_fraction', 'mean')
    """

    metric: str
    condition: str
    action: Literal["warn", "raise", "tighten", "refine", "exact", "hook", "retrain"] = "warn"
    window: int = field(default=20, metadata={"least": 1, "expected": "an integer >= 1"})
    statistic: Literal["mean", "median", "min", "max", "last"] = "mean"
    until: str | None = None
    hold: int = field(default=100, metadata={"least": 0, "expected": "an integer >= 0"})
    factor: float | None = None
    hook: str = ""

    def check(self, metrics: Metrics, hooks: Mapping[str, object]) -> None:
        """Check the trigger against the metrics and hooks of a monitor.

        Raises:
            ConfigError: the metric or the hook does not exist, a condition is not valid, or options contradict.
        """
        owner = f"The trigger on {self.metric!r}"
        metrics.check("A trigger", self.metric)
        self.check_form()
        if self.action == "hook" and self.hook not in hooks:
            raise ConfigError(
                f"{owner}: the monitor has no hook {self.hook!r}.{did_you_mean(self.hook, hooks)} Available: "
                f"{listing(hooks)}. Pass functions as Monitor(hooks={{name: function}})."
            )

    def check_form(self) -> None:
        """Check what does not need a monitor.

        Raises:
            ConfigError: a condition is not valid, or options contradict.
        """
        owner = f"The trigger on {self.metric!r}"
        fires = Condition.parse(self.condition, owner)
        if self.until is not None and Condition.parse(self.until, owner, "until").sign[0] == fires.sign[0]:
            expected = f"a condition on the other side of {self.condition!r}"
            raise ConfigError.bad_value(owner, "until", self.until, expected)
        if self.factor is not None:
            self._check_factor(owner)
        if self.action != "hook" and self.hook:
            raise ConfigError(f"{owner}: hook = {self.hook!r} requires action = 'hook' (got {self.action!r}).")

    def _check_factor(self, owner: str) -> None:
        assert self.factor is not None
        if self.action == "tighten" and not 0 < self.factor < 1:
            raise ConfigError.bad_value(owner, "factor", self.factor, "a number between 0 and 1 for 'tighten'")
        if self.action == "refine" and not 1 < self.factor < float("inf"):
            raise ConfigError.bad_value(owner, "factor", self.factor, "a number above 1 for 'refine'")
        if self.action not in ("tighten", "refine"):
            raise ConfigError(f"{owner}: only the actions 'tighten' and 'refine' take a factor.")


@dataclass(frozen=True)
class Transition:
    """A change of a trigger.

    Attributes:
        fired: True if it fired, False if it was cleared.
        value: the statistic that decided; None if the metric was not measured.
    """

    trigger: Trigger
    fired: bool
    value: float | None


class TriggerState:
    """The state of one trigger.

    Attributes:
        active: whether it has fired and was not cleared since.
    """

    def __init__(self, trigger: Trigger) -> None:
        self.trigger = trigger
        self.active = False
        self._fires = Condition.parse(trigger.condition)
        self._ends = Condition.parse(trigger.until) if trigger.until is not None else self._fires.opposite()
        self._window: deque[float] = deque(maxlen=trigger.window)
        self._since = 0  # rows since it changed
        self._hold_factor = 0  # how often the action lasts `hold`; 0: it never fired

    def see(self, values: Mapping[str, float]) -> Transition | None:
        """Take one row's values and return the transition, if any."""
        self._since += 1
        if self.trigger.metric in values:
            self._window.append(values[self.trigger.metric])
        full = len(self._window) == self.trigger.window
        result = _STATISTIC[self.trigger.statistic](list(self._window)) if full else None
        return self._clear(result) if self.active else self._fire(result)

    def _fire(self, value: float | None) -> Transition | None:
        if value is None or not self._fires(value):
            return None
        relapsed = self._hold_factor > 0 and self._since <= self.trigger.window + self.trigger.hold
        self._hold_factor = min(LONGEST, 2 * self._hold_factor) if relapsed else 1
        return self._turn(True, value)

    def _clear(self, value: float | None) -> Transition | None:
        if self._since < self.trigger.hold * self._hold_factor:
            return None
        if value is None and self._window:
            return None  # measured, but not often enough yet
        if value is not None and not self._ends(value):
            return None
        return self._turn(False, value)

    def _turn(self, fired: bool, value: float | None) -> Transition:
        self.active = fired
        self._since = 0
        self._window.clear()
        return Transition(self.trigger, fired, value)
