"""What one solve did, from device arrays to the numbers of a row.

A solve leaves small arrays `(batch,)` on its device. They are kept as they are until a flush, put end to end there and
moved to the host in **one** transfer; the statistics are taken on the host. So a solve costs the training no device
operation and no wait of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from deqcore.abc.backend import Backend
from deqcore.solution import Solution
from deqcore.types import AdjointReport, Array, BackwardRecord, Status

Host: TypeAlias = NDArray[np.float64]

FORWARD = ("residual", "status", "steps", "evaluations")
BACKWARD = AdjointReport._fields
JUDGED = ("status", "vjps", "residual", "error", "fallback")


@dataclass
class Pending:
    """A solve whose arrays are still on the device.

    Attributes:
        arrays: by part ("forward.residual", "backward.vjps", or a metric's name), `(batch,)` or scalars.
        seconds: host times, by metric.
        record: which is filled when the backward pass runs, or None.
        reused: whether the strategy reuses an estimate, so that its first product is the certificate.
        held: whether a flush has waited for its backward pass already.
        sent: whether it has become a row.
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

    def forward(self, solution: Solution) -> None:
        """Take the statistics of a solution."""
        self.arrays |= {f"forward.{name}": getattr(solution, name) for name in FORWARD}

    def backward(self, report: AdjointReport, seconds: float = float("nan")) -> None:
        """Take what a backward pass did."""
        known = {name: array for name, array in zip(BACKWARD, report, strict=True) if array is not None}
        self.arrays |= {f"backward.{name}": array for name, array in known.items()}
        if not math.isnan(seconds):
            self.seconds["deq_backward_seconds"] = seconds

    def awaits(self) -> bool:
        """Whether a backward pass may still come, and one more flush should be waited for."""
        return self.record is not None and self.record.runs == 0 and not self.held


def fetch(items: Sequence[Pending]) -> list[dict[str, Host]]:
    """The arrays of all items on the host, with one transfer for each device that they are on."""
    found: list[dict[str, Host]] = [{} for _ in items]
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
            found[index][part] = moved[start : start + size]
            start += size
    return found


def _move(backend: Backend, arrays: Sequence[Array]) -> Host:
    xp = backend.xp
    # float32 holds every count below 2^24 and seven digits of a residual.
    flat = [xp.reshape(backend.detach(array), (-1,)) for array in arrays]
    flat = [array if array.dtype == xp.float32 else xp.astype(array, xp.float32) for array in flat]
    moved: Host = np.asarray(backend.to_numpy(xp.concat(flat)), np.float64)
    return moved


def values(item: Pending, host: dict[str, Host]) -> dict[str, float]:
    """The metrics of a solve, from its arrays on the host. What was not measured is left out."""
    found = dict(item.seconds)
    if "forward.status" in host and host["forward.status"].size:
        found |= _forward(*(host[f"forward.{name}"] for name in FORWARD))
    if "backward.status" in host and host["backward.status"].size:
        found |= _backward(*(host[f"backward.{name}"] for name in JUDGED), reused=item.reused)
        coupling = host.get("backward.coupling", np.zeros(0))
        if coupling.size and not np.isnan(coupling).all():
            found["deq_coupling"] = float(np.nanmax(coupling))
    found |= {part: float(array.mean()) for part, array in host.items() if "." not in part}
    return {name: value for name, value in found.items() if not math.isnan(value)}


# NumPy's mean and median cost ten times what adding up a batch does, and there are many of them.


def _forward(residual: Host, status: Host, steps: Host, evaluations: Host) -> dict[str, float]:
    size = status.size
    unknown = np.isnan(residual)
    lost = np.count_nonzero((status == int(Status.NONFINITE)) | (status == int(Status.DIVERGED)))
    found = {
        "deq_forward_steps": float(np.add.reduce(steps)) / size,
        "deq_forward_steps_max": float(np.maximum.reduce(steps)),
        "deq_forward_evaluations": float(np.add.reduce(evaluations)) / size,
        "deq_nonfinite_fraction": lost / size,
    }
    if unknown.all() and not lost:  # a strategy with fixed steps that has not measured a residual
        return found
    known = np.sort(np.where(unknown, np.inf, residual))
    missed = (status != int(Status.CONVERGED)) & (status != int(Status.FIXED_STEPS))  # fixed steps have no tolerance
    return found | {
        "deq_forward_residual": _middle(known),
        "deq_forward_residual_max": float(known[-1]),
        "deq_unconverged_fraction": np.count_nonzero(missed) / size,
    }


def _backward(
    status: Host, vjps: Host, residual: Host, error: Host, fallback: Host, *, reused: bool
) -> dict[str, float]:
    size = status.size
    found = {
        "deq_backward_steps": float(np.add.reduce(vjps)) / size,
        "deq_backward_steps_max": float(np.maximum.reduce(vjps)),
        "deq_uncertified_fraction": np.count_nonzero(status != int(Status.CONVERGED)) / size,
        "deq_fallback_fraction": np.count_nonzero(fallback) / size,
    }
    if reused:
        found["deq_refined_fraction"] = np.count_nonzero(vjps > 1) / size
    measured = np.sort(residual[~np.isnan(residual)])
    if measured.size:
        found["deq_backward_residual"] = _middle(measured)
        found["deq_backward_residual_max"] = float(measured[-1])
    certified = error[~np.isnan(error)]
    if certified.size:
        found["deq_backward_error"] = float(np.maximum.reduce(certified))
    return found


def _middle(ordered: Host) -> float:
    """The median of numbers in order."""
    half = ordered.size // 2
    return float(ordered[half] if ordered.size % 2 else (ordered[half - 1] + ordered[half]) / 2)
