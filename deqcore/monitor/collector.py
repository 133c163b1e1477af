"""From the device arrays of solves to rows: what waits for a flush, one transfer, statistics, drift, triggers.

A solve leaves small arrays `(batch,)` on its device. They are kept until a flush, concatenated there and moved to the
host in **one** transfer; the statistics are computed on the host. So a solve adds no device operation and no wait to
the training.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from threading import RLock
from typing import Final

import numpy as np

from deqcore import plugins
from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy
from deqcore.api import get_backend
from deqcore.config import Config
from deqcore.monitor.actions import TriggerSet
from deqcore.monitor.depths import depths_of
from deqcore.monitor.drift import DriftDetector, HostArray, Profile, Samples
from deqcore.monitor.sink import Event, Record, Row
from deqcore.solution import Solution, failed
from deqcore.types import AdjointReport, Array, BackwardRecord, Status

RECENT: Final = 1000
SETTINGS: Final = 32
"""Different settings of a layer that are recorded; a tolerance may change in every step."""

FORWARD = ("residual", "status", "steps", "evaluations")
BACKWARD = AdjointReport._fields
REPORTED = ("status", "vjps", "residual", "error", "fallback")


@dataclass
class PendingRow:
    """A solve whose arrays are still on the device.

    Attributes:
        arrays: by part ("forward.residual", "backward.vjps", or a metric's name), `(batch,)` or scalars.
        seconds: host times, by metric.
        record: which is filled when the backward pass runs, or None.
        reused: whether the strategy reuses an estimate, so that its first product is the certificate.
        held: whether a flush has waited for its backward pass already.
        sent: whether it has become a row.
        config: that the solve ran with, if its row records it.
    """

    step: int
    solve: int
    time: float
    name: str
    backend: Backend
    arrays: dict[str, Array] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    record: BackwardRecord | None = None
    reused: bool = False
    held: bool = False
    sent: bool = False
    config: Config | None = None

    def forward(self, solution: Solution) -> None:
        """Take the statistics of a solution."""
        self.arrays |= {f"forward.{name}": getattr(solution, name) for name in FORWARD}
        if solution.mask is not None:
            self.arrays["forward.mask"] = solution.mask

    def backward(self, report: AdjointReport, seconds: float = float("nan")) -> None:
        """Take the report of a backward pass."""
        available = {name: array for name, array in zip(BACKWARD, report, strict=True) if array is not None}
        self.arrays |= {f"backward.{name}": array for name, array in available.items()}
        if not math.isnan(seconds):
            self.seconds["deq_backward_seconds"] = seconds

    def awaits(self) -> bool:
        """Return whether a backward pass may still come, and one more flush should be waited for."""
        return self.record is not None and self.record.runs == 0 and not self.held


def fetch(items: Sequence[PendingRow]) -> list[dict[str, HostArray]]:
    """Return the arrays of all items on the host, with one transfer for each device that they are on."""
    results: list[dict[str, HostArray]] = [{} for _ in items]
    groups: dict[tuple[int, str], list[tuple[int, str, Array]]] = {}
    for index, item in enumerate(items):
        for part, array in item.arrays.items():
            key = id(item.backend), str(item.backend.device_of(array))
            groups.setdefault(key, []).append((index, part, array))
    for members in groups.values():
        backend = items[members[0][0]].backend
        start = 0
        moved = _move(backend, [array for _, _, array in members])
        for index, part, array in members:
            size = math.prod(array.shape)
            results[index][part] = moved[start : start + size]
            start += size
    return results


def _move(backend: Backend, arrays: Sequence[Array]) -> HostArray:
    xp = backend.xp
    # float32 holds every count below 2^24 and seven digits of a residual.
    flat = [xp.reshape(backend.detach(array), (-1,)) for array in arrays]
    flat = [array if array.dtype == xp.float32 else xp.astype(array, xp.float32) for array in flat]
    moved: HostArray = np.asarray(backend.to_numpy(xp.concat(flat)), np.float64)
    return moved


def counted(host: dict[str, HostArray]) -> dict[str, HostArray]:
    """Return the arrays of a solve without the units that its mask leaves out."""
    mask = host.get("forward.mask")
    if mask is None:
        return host
    others = {part: array for part, array in host.items() if part != "forward.mask"}
    return {part: array[mask > 0] if array.size == mask.size else array for part, array in others.items()}


def values(item: PendingRow, host: dict[str, HostArray]) -> dict[str, float]:
    """Return the metrics of a solve, from its arrays on the host. What was not measured is left out."""
    result = dict(item.seconds)
    if "forward.status" in host and host["forward.status"].size:
        result |= _forward(*(host[f"forward.{name}"] for name in FORWARD))
    if "backward.status" in host and host["backward.status"].size:
        result |= _backward(*(host[f"backward.{name}"] for name in REPORTED), reused=item.reused)
        coupling = host.get("backward.coupling", np.zeros(0))
        if coupling.size and not np.isnan(coupling).all():
            result["deq_coupling"] = float(np.nanmax(coupling))
        result |= _audited(host)
    result |= {part: float(array.mean()) for part, array in host.items() if "." not in part}
    return {name: value for name, value in result.items() if not math.isnan(value)}


# NumPy's mean and median cost ten times as much as a sum over a batch, and there are many of them.


def _forward(residual: HostArray, status: HostArray, steps: HostArray, evaluations: HostArray) -> dict[str, float]:
    size = status.size
    unknown = np.isnan(residual)
    lost = np.count_nonzero((status == int(Status.NONFINITE)) | (status == int(Status.DIVERGED)))
    result = {
        "deq_forward_steps": float(np.add.reduce(steps)) / size,
        "deq_forward_steps_max": float(np.maximum.reduce(steps)),
        "deq_forward_evaluations": float(np.add.reduce(evaluations)) / size,
        "deq_nonfinite_fraction": lost / size,
    }
    if unknown.all() and not lost:  # a strategy with fixed steps that has not measured a residual
        return result
    available = np.sort(np.where(unknown, np.inf, residual))
    return result | {
        "deq_forward_residual": _median(available),
        "deq_forward_residual_max": float(available[-1]),
        "deq_unconverged_fraction": np.count_nonzero(failed(status)) / size,
    }


def _backward(
    status: HostArray, vjps: HostArray, residual: HostArray, error: HostArray, fallback: HostArray, *, reused: bool
) -> dict[str, float]:
    size = status.size
    result = {
        "deq_backward_steps": float(np.add.reduce(vjps)) / size,
        "deq_backward_steps_max": float(np.maximum.reduce(vjps)),
        "deq_uncertified_fraction": np.count_nonzero(status != int(Status.CONVERGED)) / size,
        "deq_fallback_fraction": np.count_nonzero(fallback) / size,
    }
    if reused:
        result["deq_refined_fraction"] = np.count_nonzero(vjps > 1) / size
    measured = np.sort(residual[~np.isnan(residual)])
    if measured.size:
        result["deq_backward_residual"] = _median(measured)
        result["deq_backward_residual_max"] = float(measured[-1])
    certified = error[~np.isnan(error)]
    if certified.size:
        result["deq_backward_error"] = float(np.maximum.reduce(certified))
    return result


def _audited(host: dict[str, HostArray]) -> dict[str, float]:
    """Return what an audit of a strategy with state has found, the same for all samples."""
    products = host.get("backward.gradient_products", np.zeros(0))
    if not products.size or not products.any():
        return {}
    figures = {"deq_gradient_products": float(products[0])}
    for name in ("gradient_error", "gradient_cosine"):
        figures[f"deq_{name}"] = float(host[f"backward.{name}"][0])
    return figures


def _median(ordered: HostArray) -> float:
    """Return the median of numbers in order."""
    half = ordered.size // 2
    return float(ordered[half] if ordered.size % 2 else (ordered[half - 1] + ordered[half]) / 2)


class Collector:
    """Solves, backward passes and further figures that wait for the next flush.

    Attributes:
        lock: held while the collector changes or is emptied.
        solves: how many solves have been seen.
        since: how many of them since the last flush.
        step: the training step as the user counts it, or None.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.solves = 0
        self.since = 0
        self.step: int | None = None
        self._pending: list[PendingRow] = []
        self._configs: dict[str, set[Config]] = {}

    def __len__(self) -> int:
        return len(self._pending)

    @property
    def now(self) -> int:
        """The training step, or else the number of solves."""
        return self.solves if self.step is None else self.step

    def solution(self, solution: Solution, name: str, seconds: float | None, config: Config) -> None:
        """Take a solution, and its backward pass when that has run."""
        with self.lock:
            item = self._item(name, solution.backend, config.backward.strategy)
            item.config = self._unseen(name, config)
            item.forward(solution)
            if seconds is not None:
                item.seconds["deq_forward_seconds"] = seconds
            record = item.record = solution.record
            if record is not None:
                if record.report is not None:
                    item.backward(record.report, record.seconds)
                record.listener = lambda record: self._on_backward(item, record)
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
        owner = next((result for result in owners.values() if result not in (None, "numpy")), "numpy")
        with self.lock:
            item = self._item(name, get_backend(backend=owner), "")
            for metric, value in figures.items():
                if owner != "numpy" and owners[metric] == owner:
                    item.arrays[metric] = value
                else:
                    item.seconds[metric] = float(value)
            self._pending.append(item)

    def take(self, *, final: bool) -> list[PendingRow]:
        """Return the ready items; hold a solve back once if its backward pass may still run, unless this is the end."""
        self.since = 0
        ready = [item for item in self._pending if final or not item.awaits()]
        self._pending = [item for item in self._pending if not final and item.awaits()]
        for item in self._pending:
            item.held = True
        for item in ready:
            item.sent = True
        return ready

    def _unseen(self, name: str, config: Config) -> Config | None:
        """Return the settings if the layer has not run with them before; `SETTINGS` of them at most."""
        known = self._configs.setdefault(name, set())
        if config in known or len(known) >= SETTINGS:
            return None
        known.add(config)
        return config

    def _item(self, name: str, backend: Backend, strategy: str) -> PendingRow:
        return PendingRow(
            self.now, self.solves, time.time(), name, backend, reused=bool(strategy) and _reuses(strategy)
        )

    def _on_backward(self, item: PendingRow, record: BackwardRecord) -> None:
        """Record a backward pass, which may run after its solve became a row."""
        if record.report is None:
            return
        with self.lock:
            if item.sent or "backward.status" in item.arrays:
                item = PendingRow(self.now, item.solve, time.time(), item.name, item.backend, reused=item.reused)
                self._pending.append(item)
            item.backward(record.report, record.seconds)


@lru_cache(maxsize=64)
def _reuses(strategy: str) -> bool:
    """Return whether a strategy works with the forward solver's estimate: its first product is then a certificate."""
    cls = plugins.load("strategy", strategy)
    return isinstance(cls, type) and issubclass(cls, Strategy) and cls.needs == "estimate"


def _recorded(config: Config | None) -> dict[str, object]:
    """Return the settings of a solve as plain values."""
    plain = {} if config is None else config.as_dict()
    return {name: plain[name] for name in ("backend", "forward", "backward") if name in plain}


class RowBuilder:
    """Turns pending rows into rows and events.

    Args:
        alarms: the triggers at work.
        reference: what drift is measured against, or None.

    Attributes:
        rows: the latest.
        events: the latest.
        samples: residuals and steps of the latest samples.
    """

    def __init__(self, triggers: TriggerSet, reference: Profile | None) -> None:
        self.triggers = triggers
        self.rows: deque[Row] = deque(maxlen=RECENT)
        self.events: deque[Event] = deque(maxlen=RECENT)
        self.samples = Samples()
        self._drift = DriftDetector(reference) if reference is not None else None

    def records(self, ready: Sequence[PendingRow]) -> list[Record]:
        """Return the rows and the events that they cause, in order."""
        results: list[Record] = []
        for item, host in zip(ready, map(counted, fetch(ready)), strict=True):
            figures = values(item, host)
            self.samples.add(host)
            if self._drift is not None:
                figures |= self._drift.measure(self.samples)
            if self.triggers.may_mark:
                figures["deq_retrain"] = float(self.triggers.retrain is not None)
            depths = depths_of(host.get("forward.steps", ()))
            row = Row(item.step, item.solve, item.time, figures, item.name, _recorded(item.config), depths)
            events = self.triggers.see(row)
            self.rows.append(row)
            self.events.extend(events)
            results += [row, *events]
        return results
