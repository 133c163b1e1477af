"""`Monitor`: sees every solve, keeps its figures on the device, writes them to sinks, and acts on triggers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import final

from deqcore.abc.backend import Backend
from deqcore.config import Config, current
from deqcore.errors import ConfigError, MonitorWarning
from deqcore.linear.norms import default_rtol
from deqcore.monitor.actions import Hook, TriggerSet, has_actions
from deqcore.monitor.collector import Collector, RowBuilder
from deqcore.monitor.delivery import SinkGroup
from deqcore.monitor.drift import METRICS as DRIFT_METRICS
from deqcore.monitor.drift import TRIGGERS, Profile
from deqcore.monitor.measurements import Measurement, make_measurements
from deqcore.monitor.metrics import Metric, Metrics
from deqcore.monitor.settings import MonitorSettings, SinkLike, make_triggers
from deqcore.monitor.sink import Event, Row, RunInfo
from deqcore.monitor.triggers import Trigger
from deqcore.solution import Solution
from deqcore.solve.observer import Observer, Solve, observing
from deqcore.solve.user_line import warn
from deqcore.types import AdjointReport, Array


@final
class Monitor(Observer):
    """Observe solves, write their figures to sinks, and act on triggers.

    Inside its `with` block every `fixed_point` and `vjp` of this thread or task is observed. The statistics stay on
    the device and move to the host in one transfer every `every` solves. A sink that fails gives one warning and never
    stops the training.

    The actions "tighten", "refine" and "exact" change the settings of the solves inside the block, whatever
    their config is. They cannot change code that JAX has compiled: call it inside
    `with deqcore.using(monitor.config):`, which recompiles when an action changes a setting.

    Args:
        config: its section `[monitor]` has the defaults of the other arguments; also the base of `monitor.config`.
        sinks: sinks, registered names, or tables such as `{"sink": "csv", "path": "run.csv"}`.
        triggers: `Trigger`s, or tables of their fields.
        every: solves between transfers.
        hooks: functions by name, for the action "hook"; each takes the `Event`. Their exceptions propagate.
        metrics: further metrics, for `log`.
        reference: a profile or its file. The monitor measures drift against it, which sets the retrain mark.
        measurements: costly measurements, each taken on every n-th solve: `Measurement`s, or a table of the solves
            between them, such as `{"spectral_radius": 200}`.

    Attributes:
        collects: whether traced code reports by itself, so that solves inside it need no note.

    Raises:
        ConfigError: a setting, a metric, a condition or an option of a sink does not fit.
        MissingExtraError: a package that a sink needs is not installed.

    Example:
        >>> import numpy as np, deqcore
        >>> with Monitor(sinks=[]) as monitor:
        ...     sol = deqcore.fixed_point(lambda z: 0.5 * z + 1.0, np.zeros((4, 2)))
        >>> row = monitor.rows[-1]
        >>> float(row.values["deq_unconverged_fraction"]), row.values["deq_forward_steps"] == float(sol.steps.mean())
        (0.0, True)
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        sinks: Iterable[SinkLike] | None = None,
        triggers: Iterable[Trigger | Mapping[str, object]] | None = None,
        every: int | None = None,
        hooks: Mapping[str, Hook] | None = None,
        metrics: Iterable[Metric] = (),
        reference: Profile | str | Path | None = None,
        measurements: Iterable[Measurement] | Mapping[str, object] | None = None,
    ) -> None:
        self._base = current() if config is None else config
        given = MonitorSettings.of(self._base.section("monitor") if config is not None else {})
        self.every = given.every if every is None else every
        if self.every < 1:
            raise ConfigError.bad_value("Monitor", "every", every, "an integer >= 1")
        self.metrics = Metrics(metrics)
        profile_source = given.reference if reference is None else reference
        profile = Profile.load(profile_source) if isinstance(profile_source, (str, Path)) else profile_source
        made = make_triggers(given.triggers if triggers is None else triggers)
        if profile is not None and not any(trigger.metric in DRIFT_METRICS for trigger in made):
            made += TRIGGERS
        for trigger in made:
            trigger.check(self.metrics, hooks or {})
        self._measurements = list(make_measurements(given.measurements if measurements is None else measurements))
        for metric in (metric for measurement in self._measurements for metric in measurement.names):
            self.metrics.check("A measurement", metric)
        self._triggers = TriggerSet(made, hooks or {})
        self._row_builder = RowBuilder(self._triggers, profile)
        self._collector = Collector()
        run = RunInfo(self.metrics, time.time(), self._base.as_dict())
        self._sinks = SinkGroup(given.sinks if sinks is None else sinks, run)
        self.collects = False
        self._notes: list[Event] = []
        self._noted: set[str] = set()
        self._rtol: float | None = None
        self._least = 0.0
        self._stack: ExitStack | None = None
        self._closed = False

    # -- what the user reads ------------------------------------------------------------------------------------

    @property
    def rows(self) -> Sequence[Row]:
        """The latest 1000 rows."""
        return self._row_builder.rows

    @property
    def events(self) -> Sequence[Event]:
        """The latest 1000 events of triggers."""
        return self._row_builder.events

    @property
    def config(self) -> Config:
        """The monitor's own settings with the actions in force: for `using`, or for a call's `config=`."""
        return self._triggers.apply(self._base, self._rtol, self._least)

    @property
    def entered(self) -> bool:
        """Whether it is inside its `with` block."""
        return self._stack is not None

    @property
    def retrain(self) -> str | None:
        """Why the model should be trained again, or None."""
        return self._triggers.retrain

    @property
    def step(self) -> int:
        """The training step as `advance` counts it, or else the number of solves so far."""
        return self._collector.now

    def profile(self) -> Profile:
        """Return the distribution of residuals and steps over the latest samples, to save with the model."""
        self.flush()
        return self._row_builder.samples.profile()

    # -- what is observed ---------------------------------------------------------------------------------------

    def adjust(self, config: Config, backend: Backend) -> Config:
        """Return the settings of a solve inside the block, with the actions in force."""
        if not self._triggers.active or has_actions(config):
            return config
        adjusted = self._triggers.apply(config, self._rtol, self._least)
        if adjusted == config:
            actions = " and ".join(sorted({trigger.action for trigger in self._triggers.active}))
            self._note(
                f"The action {actions} has no effect on a solve with forward.rtol = {config.forward.rtol} and "
                f"backward.strategy = {config.backward.strategy!r}: its budget cannot be raised further."
            )
        elif not backend.capabilities.eager:
            self._note(
                f"{backend.name} compiles its solves, so the action of a trigger reaches them only inside "
                f"`with deqcore.using(monitor.config):`."
            )
            return config
        return adjusted

    def solved(self, solve: Solve) -> None:
        """Take the statistics of a solve inside the block."""
        solution = solve.solution
        if solution.backend.is_traced(solution.status):
            if not self.collects:
                self._note(
                    "The monitor cannot see a solve inside traced code. Observe its solution there "
                    "(deqcore_jax.callbacks.observe) or outside (monitor.observe)."
                )
            return
        number = self._collector.solves
        self.observe(solution, seconds=solve.seconds, config=solve.config)
        for measurement in [item for item in self._measurements if number % item.every == 0]:
            self._measure(measurement, solve)

    def observe(
        self,
        solution: Solution,
        *,
        name: str = "",
        seconds: float | None = None,
        config: Config | None = None,
        defer: bool = False,
    ) -> None:
        """Take the statistics of a solution, and of its backward pass when that has run.

        Args:
            solution: what `fixed_point` returned, outside of traced code.
            name: of the layer, for models with several.
            seconds: that the solve took.
            config: settings that it ran with; default: the monitor's own.
            defer: leave the flush, when it is due, to `advance` or to the next solve: for threads where triggers must
                not act.
        """
        self.learn(solution)
        self._collector.solution(solution, name, seconds, self._base if config is None else config)
        if not defer:
            self._flush_if_due()

    def learn(self, solution: Solution) -> None:
        """Record the tolerance that the dtype of a solution can reach, for the action "tighten"."""
        if self._rtol is None and solution.value is not None:
            backend = solution.backend
            leaf = backend.flatten(solution.value)[0][0]
            self._rtol, self._least = default_rtol(backend, leaf), 2 * backend.eps(leaf)

    def observe_backward(self, report: AdjointReport, *, name: str = "", seconds: float = float("nan")) -> None:
        """Take the report of a backward pass that no solution leads to (an adjoint tap in JAX)."""
        self._collector.backward(report, name, seconds, self._base.backward.strategy)

    def log(self, *, layer: str = "", **figures: float | Array) -> None:
        """Record further metrics: numbers, or scalars of a framework, which stay on their device until the flush.

        Raises:
            ConfigError: a metric is unknown.
        """
        for metric in figures:
            self.metrics.check("Monitor.log", metric)
        self._collector.figures(figures, layer)

    def advance(self, step: int | None = None) -> None:
        """End a training step; later figures belong to the next one.

        Args:
            step: its number; default: one more than the last.
        """
        collector = self._collector
        collector.step = (0 if collector.step is None else collector.step) + 1 if step is None else step
        self._flush_if_due()

    def _measure(self, measurement: Measurement, solve: Solve) -> None:
        """Take a measurement; one that fails gives a warning and is removed."""
        try:
            with observing(None):
                values = measurement.take(solve)
        except Exception as error:
            self._measurements.remove(measurement)
            self._note(
                f"The measurement of {', '.join(measurement.names)} fails and is removed: {type(error).__name__}: "
                f"{error}"
            )
        else:
            self._collector.figures(values, "")

    # -- inside -------------------------------------------------------------------------------------------------

    def _flush_if_due(self) -> None:
        # Figures without solves must not pile up either.
        if self._collector.since >= self.every or len(self._collector) >= 8 * self.every:
            self.flush()

    def flush(self, *, final: bool = False) -> None:
        """Move collected figures to the host, show them to the triggers, and write them to the sinks.

        Args:
            final: include solves whose backward pass has not run yet.

        Raises:
            MonitorError: a trigger with the action "raise" fired. A hook's exception propagates, too.
        """
        with self._collector.lock:
            records = self._row_builder.records(self._collector.take(final=final))
            notes, self._notes = self._notes, []
            self._sinks.write(self.step, [*notes, *records])
            error, self._triggers.error = self._triggers.error, None
        if error is not None:
            raise error

    def _note(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._notes.append(Event(self.step, time.time(), "note", text))
            warn(text, MonitorWarning)

    def __enter__(self) -> Monitor:
        if self._closed or self._stack is not None:
            raise ConfigError("A Monitor can be entered only once. Make another one.")
        self._stack = ExitStack()
        self._stack.enter_context(observing(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stack is not None:
            self._stack.close()
            self._stack = None
        try:
            self.close()
        except Exception:
            if error is None:  # the block's own error takes precedence
                raise

    def close(self) -> None:
        """Write the remaining records and close the sinks. A `with` block calls this at its end.

        Raises:
            MonitorError: a trigger with the action "raise" fired at the last flush.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.flush(final=True)
        finally:
            self._sinks.close()
