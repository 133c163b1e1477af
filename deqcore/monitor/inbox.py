"""What a monitor has seen and not yet moved to the host. All of it may be called from any thread."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import lru_cache
from threading import RLock
from typing import Any

from deqcore import plugins
from deqcore.abc.backend import Backend
from deqcore.api import get_backend
from deqcore.monitor.figures import Pending
from deqcore.solution import Solution
from deqcore.types import AdjointReport, Array, BackwardRecord


class Inbox:
    """Solves, backward passes and further figures that wait for the next flush.

    Attributes:
        lock: held while the inbox changes, and by whoever empties it.
        solves: how many solves have been seen.
        since: how many of them since the last flush.
        step: the training step as the user counts it, or None.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.solves = 0
        self.since = 0
        self.step: int | None = None
        self._pending: list[Pending] = []

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def now(self) -> int:
        """The training step, or else the number of solves."""
        return self.solves if self.step is None else self.step

    def solution(self, solution: Solution, name: str, seconds: float | None, strategy: str) -> None:
        """Take a solution, and its backward pass when that has run."""
        with self.lock:
            item = self._item(name, solution.backend, strategy)
            item.forward(solution)
            if seconds is not None:
                item.seconds["deq_forward_seconds"] = seconds
            record = item.record = solution.record
            if record is not None:
                if record.report is not None:
                    item.backward(record.report, record.seconds)
                record.listener = lambda record: self._heard(item, record)
            self.solves += 1
            self.since += 1
            self._pending.append(item)

    def backward(self, report: AdjointReport, name: str, seconds: float, strategy: str) -> None:
        """Take a backward pass that no solution leads to."""
        backend = get_backend(backend=plugins.backend_of(report.status) or "numpy")
        with self.lock:
            item = self._item(name, backend, strategy)
            item.backward(report, seconds)
            self._pending.append(item)

    def figures(self, figures: Mapping[str, float | Array], name: str) -> None:
        """Take numbers, and scalars of one framework, which stay on their device."""
        owners = {metric: plugins.backend_of(value) for metric, value in figures.items()}
        owner = next((found for found in owners.values() if found not in (None, "numpy")), "numpy")
        with self.lock:
            item = self._item(name, get_backend(backend=owner), "")
            for metric, value in figures.items():
                if owner != "numpy" and owners[metric] == owner:
                    item.arrays[metric] = value
                else:
                    item.seconds[metric] = float(value)
            self._pending.append(item)

    def take(self, *, final: bool) -> list[Pending]:
        """What is ready; a solve is held back once if its backward pass may still come, unless this is the end."""
        self.since = 0
        ready = [item for item in self._pending if final or not item.awaits()]
        self._pending = [item for item in self._pending if not final and item.awaits()]
        for item in self._pending:
            item.held = True
        for item in ready:
            item.sent = True
        return ready

    def _item(self, name: str, backend: Backend, strategy: str) -> Pending:
        return Pending(self.now, self.solves, time.time(), name, backend, reused=bool(strategy) and _reuses(strategy))

    def _heard(self, item: Pending, record: BackwardRecord) -> None:
        """A backward pass has run, perhaps after its solve became a row."""
        if record.report is None:
            return
        with self.lock:
            if item.sent or "backward.status" in item.arrays:
                item = Pending(self.now, item.solve, time.time(), item.name, item.backend, reused=item.reused)
                self._pending.append(item)
            item.backward(record.report, record.seconds)


@lru_cache(maxsize=64)
def _reuses(strategy: str) -> bool:
    """Whether a strategy works with the forward solver's estimate, so that its first product is a certificate."""
    cls: Any = plugins.load("strategy", strategy)
    return bool(getattr(cls, "needs", None) == "estimate")
