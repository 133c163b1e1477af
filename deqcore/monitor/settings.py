"""The section `[monitor]` of a config: sinks, triggers, and how often.

[monitor]
every = 10                          # solves between transfers from the device
reference = "profile.json"          # the profile that drift is measured against
[[monitor.sinks]]
sink = "jsonl"                      # a registered name; the other keys are the sink's own options
path = "monitor.jsonl"
[[monitor.triggers]]                # see deqcore.monitor.triggers
metric = "deq_unconverged_fraction"
condition = "> 0.1"
action = "warn"
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from deqcore import plugins
from deqcore.config.sections import names_of
from deqcore.errors import ConfigError, PluginError
from deqcore.monitor.measurements import make_measurements
from deqcore.monitor.metrics import PREFIX, Metrics
from deqcore.monitor.sink import Sink
from deqcore.monitor.triggers import Trigger
from deqcore.options import Options, as_options, check, instantiate

SinkLike: TypeAlias = Sink | str | Mapping[str, object]


@dataclass(frozen=True)
class MonitorSettings:
    """The settings of the monitor.

    Attributes:
        every: solves between transfers from the device and writes to the sinks.
        reference: a file with the profile that drift is measured against, or None.
        measurements: solves between measurements, by their name.
        sinks: tables with the key "sink" and that sink's options.
        triggers: tables of `Trigger`.
    """

    every: int = field(default=10, metadata={"least": 1, "expected": "an integer >= 1"})
    reference: str | None = None
    measurements: Options = field(
        default=Options(), metadata={"expected": "a table, such as { spectral_radius = 200 }"}
    )
    sinks: tuple[Options, ...] = (Options({"sink": "jsonl"}),)
    triggers: tuple[Options, ...] = ()

    @classmethod
    def of(cls, section: Mapping[str, object]) -> MonitorSettings:
        """Check a section.

        Raises:
            ConfigError: a setting is unknown or its value does not fit.
        """
        available = names_of(cls)
        for name in section:
            if name not in available:
                raise ConfigError.unknown_option("[monitor]", name, available)
        plain = {name: section[name] for name in ("every", "reference", "measurements") if name in section}
        measurements = plain.get("measurements")
        if isinstance(measurements, Mapping):
            plain["measurements"] = as_options("[monitor.measurements]", measurements)
        values: dict[str, Any] = {name: check("[monitor]", cls, name, value) for name, value in plain.items()}
        values |= {name: _tables(name, section[name]) for name in ("sinks", "triggers") if name in section}
        return cls(**values)


def check_section(section: Mapping[str, object]) -> None:
    """Check a section `[monitor]` as far as possible without a monitor.

    Hooks and user metrics, whose names do not begin with `deq_`, are checked when a `Monitor` is made. A
    sink must be registered; its options are checked when it is made, since that imports its package.

    Raises:
        ConfigError: a setting is unknown, or a value, a condition or a metric does not fit.
        UnknownNameError: a sink is not registered.
    """
    given = MonitorSettings.of(section)
    for trigger in make_triggers(given.triggers):
        trigger.check_form()
        if trigger.metric.startswith(PREFIX):
            Metrics().check("A trigger", trigger.metric)
    for table in given.sinks:
        plugins.spec("sink", _sink_name(table))
    make_measurements(given.measurements)


def _tables(name: str, given: object) -> tuple[Options, ...]:
    tables: list[object] = list(given) if isinstance(given, (list, tuple)) else [given]
    if name == "sinks":  # a name alone will do
        tables = [{"sink": table} if isinstance(table, str) else table for table in tables]
    return tuple(_table(name, table) for table in tables)


def _table(name: str, given: object) -> Options:
    if not isinstance(given, Mapping):
        raise ConfigError.bad_value("[monitor]", name, given, f"a table, written [[monitor.{name}]]")
    return Options(given, f"[[monitor.{name}]]")


def make_sink(given: SinkLike) -> tuple[str, Sink]:
    """Return a sink, and the name to call it by.

    Args:
        given: a sink, a registered name, or a table with the key "sink" and options.

    Raises:
        UnknownNameError: it is not registered.
        ConfigError: an option is unknown or does not fit.
        PluginError: the registered target is not a sink.
    """
    if isinstance(given, Sink):
        return type(given).__name__, given
    table = {"sink": given} if isinstance(given, str) else dict(given)
    name = _sink_name(table)
    del table["sink"]
    target: Any = plugins.load("sink", name)
    made: object = instantiate(f"sink {name!r}", target, table)
    if not isinstance(made, Sink):
        raise PluginError(f"The sink {name!r} must be a subclass of deqcore.monitor.Sink (got {target!r}).")
    return name, made


def _sink_name(table: Mapping[str, object]) -> str:
    name = table.get("sink")
    if not isinstance(name, str):
        raise ConfigError.bad_value("[[monitor.sinks]]", "sink", name, "the name of a registered sink")
    return name


def make_triggers(given: Iterable[Trigger | Mapping[str, object]]) -> tuple[Trigger, ...]:
    """Return triggers from tables.

    Raises:
        ConfigError: an option is unknown or does not fit.
    """
    made = (
        item if isinstance(item, Trigger) else instantiate("trigger in [[monitor.triggers]]", Trigger, item)
        for item in given
    )
    return tuple(made)
