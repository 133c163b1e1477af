"""Settings that change during training: unrolled pre-training, tolerances that tighten, step budgets that grow."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Final

from deqcore.config.config import resolve
from deqcore.errors import ConfigError
from deqcore.options import freeze

SMOOTH: Final = ("forward__rtol", "forward__atol", "forward__max_steps")


@dataclass(frozen=True)
class Ramp:
    """A number that moves from `start` to `end`, linearly in its logarithm, between the steps `begin` and `until`.

    Args:
        start: value up to step `begin`, above 0.
        end: value from step `until` on, above 0.
        until: training step.
        begin: training step, below `until`.

    Raises:
        ConfigError: start or end is not above 0, or `until` is not after `begin`.

    Example:
        >>> ramp = Ramp(1e-2, 1e-4, until=100)
        >>> [float(f"{ramp.at(step):.1e}") for step in (0, 50, 500)]
        [0.01, 0.001, 0.0001]
    """

    start: float
    end: float
    until: int
    begin: int = 0

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0):
            raise ConfigError.bad_value("Ramp", "start and end", (self.start, self.end), "numbers above 0")
        if not self.begin < self.until:
            raise ConfigError.bad_value("Ramp", "until", self.until, f"a step after begin = {self.begin}")

    def at(self, step: int) -> float:
        """Return the value at a training step."""
        part = min(1.0, max(0.0, (step - self.begin) / (self.until - self.begin)))
        if part in (0.0, 1.0):
            return self.end if part else self.start
        return exp((1 - part) * log(self.start) + part * log(self.end))


class Schedule:
    """Overrides of settings by training step.

    A stage applies from its step until the next one begins; a later stage replaces the earlier ones completely. Values
    of `forward__rtol`, `forward__atol` and `forward__max_steps` may be a `Ramp`. In JAX these three recompile nothing
    when they are passed as arrays; another solver or strategy compiles once per stage. Entries of `forward__options`
    and `backward__options` may be a `Ramp`, too (a depth, a damping, a noise): rounded if both its ends are integers,
    and in JAX each value compiles once.

    Args:
        stages: pairs (first training step, overrides), in increasing order, the first at step 0.

    Raises:
        ConfigError: the steps do not increase from 0, a setting is unknown or out of range, or a ramp is given for a
            setting that does not take one.

    Source: unrolled pre-training: Bai, Kolter & Koltun (2019), §4; tolerance schedules: docs/notes.

    Example:
        >>> from deqcore.config.schedule import Ramp, Schedule
        >>> schedule = Schedule([
        ...     (0, {"backward__strategy": "unrolled", "backward__options": {"steps": 6}}),
        ...     (1000, {"forward__rtol": Ramp(1e-2, 1e-4, until=5000, begin=1000)}),
        ... ])
        >>> schedule.at(10)["backward__strategy"], round(schedule.at(3000)["forward__rtol"], 6)
        ('unrolled', 0.001)
    """

    def __init__(self, stages: Sequence[tuple[int, Mapping[str, object]]]) -> None:
        self.starts = [start for start, _ in stages]
        self.stages = [dict(overrides) for _, overrides in stages]
        if not stages or self.starts[0] != 0 or self.starts != sorted(set(self.starts)):
            raise ConfigError.bad_value("Schedule", "stages", self.starts, "training steps that increase from 0")
        for start, overrides in zip(self.starts, self.stages, strict=True):
            for name, value in overrides.items():
                if isinstance(value, Ramp) and name not in SMOOTH:
                    raise ConfigError.bad_value(
                        "Schedule", name, value, f"a plain value, as only {', '.join(SMOOTH)} take a Ramp"
                    )
                if not isinstance(value, Ramp):
                    freeze("Schedule", name, _at(name, value, start))
            resolve(None, self.at(start))

    def at(self, step: int) -> dict[str, object]:
        """Return the overrides at a training step, for `fixed_point`, `deqcore.using` or a layer's `solve`.

        Args:
            step: training step, at least 0.

        Raises:
            ConfigError: the step is negative.
        """
        if step < 0:
            raise ConfigError.bad_value("Schedule", "step", step, "a training step of at least 0")
        stage = self.stages[bisect_right(self.starts, step) - 1]
        return {name: _at(name, value, step) for name, value in stage.items()}


def _at(name: str, value: object, step: int) -> object:
    if isinstance(value, Mapping):
        return {key: _at(key, part, step) for key, part in value.items()}
    if not isinstance(value, Ramp):
        return value
    number = value.at(step)
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    return round(number) if name == "forward__max_steps" or (whole and "__" not in name) else number
