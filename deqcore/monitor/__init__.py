"""The monitor: numbers of every solve, in training and in production.

The public names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deqcore.lazy import lazy_names

if TYPE_CHECKING:
    from deqcore.monitor.drift import Profile
    from deqcore.monitor.measurements import Measurement
    from deqcore.monitor.metrics import Metric, Metrics
    from deqcore.monitor.monitor import Monitor
    from deqcore.monitor.sink import Event, Record, Row, RunInfo, Sink
    from deqcore.monitor.triggers import Trigger

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "deqcore.monitor.drift": ["Profile"],
        "deqcore.monitor.measurements": ["Measurement"],
        "deqcore.monitor.metrics": ["Metric", "Metrics"],
        "deqcore.monitor.monitor": ["Monitor"],
        "deqcore.monitor.sink": ["Event", "Record", "Row", "RunInfo", "Sink"],
        "deqcore.monitor.triggers": ["Trigger"],
    },
)
