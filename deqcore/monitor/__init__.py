"""The monitor: numbers of every solve, in training and in production.

The public names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from deqcore.monitor.drift import Profile
    from deqcore.monitor.measurements import Measurement
    from deqcore.monitor.metrics import Metric, Metrics
    from deqcore.monitor.monitor import Monitor
    from deqcore.monitor.sink import Event, Record, Row, RunInfo, Sink
    from deqcore.monitor.triggers import Trigger

_HOME: Final = {
    "Event": "deqcore.monitor.sink",
    "Metric": "deqcore.monitor.metrics",
    "Metrics": "deqcore.monitor.metrics",
    "Monitor": "deqcore.monitor.monitor",
    "Measurement": "deqcore.monitor.measurements",
    "Profile": "deqcore.monitor.drift",
    "Record": "deqcore.monitor.sink",
    "Row": "deqcore.monitor.sink",
    "RunInfo": "deqcore.monitor.sink",
    "Sink": "deqcore.monitor.sink",
    "Trigger": "deqcore.monitor.triggers",
}

__all__ = [
    "Event",
    "Measurement",
    "Metric",
    "Metrics",
    "Monitor",
    "Profile",
    "Record",
    "Row",
    "RunInfo",
    "Sink",
    "Trigger",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
