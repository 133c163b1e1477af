"""From what was seen to records: statistics, drift, triggers."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from deqcore.monitor.alarms import Alarms
from deqcore.monitor.drift import Drift, Profile, Samples
from deqcore.monitor.figures import Pending, fetch, values
from deqcore.monitor.sink import Event, Record, Row

RECENT: Final = 1000


class Analysis:
    """Turns what an inbox held into rows and events.

    Args:
        alarms: the triggers at work.
        reference: what drift is measured against, or None.

    Attributes:
        rows: the latest.
        events: the latest.
        samples: residuals and steps of the latest samples.
    """

    def __init__(self, alarms: Alarms, reference: Profile | None) -> None:
        self.alarms = alarms
        self.rows: deque[Row] = deque(maxlen=RECENT)
        self.events: deque[Event] = deque(maxlen=RECENT)
        self.samples = Samples()
        self._drift = Drift(reference) if reference is not None else None

    def records(self, ready: Sequence[Pending]) -> list[Record]:
        """Rows and the events that they cause, in order."""
        found: list[Record] = []
        for item, host in zip(ready, fetch(ready), strict=True):
            figures = values(item, host)
            self.samples.add(host)
            if self._drift is not None:
                figures |= self._drift.measure(self.samples)
            if self.alarms.may_mark:
                figures["deq_retrain"] = float(self.alarms.retrain is not None)
            row = Row(item.step, item.solve, item.time, figures, item.name)
            events = self.alarms.see(row)
            self.rows.append(row)
            self.events.extend(events)
            found += [row, *events]
        return found
