"""What one solve did, from device arrays to the numbers of a row.

A solve leaves small arrays `(batch,)` on its device. They are kept as they are until a flush, put end to end there and
moved to the host in **one** transfer; the statistics are taken on the host. So a solve costs the training no device
operation and no wait of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deqcore.backend import Array, Backend, BackwardRecord
from deqcore.solution import Solution, Status
from deqcore.strategy import AdjointReport

Host: TypeAlias = NDArray[np.float64]

FORWARD = ("residual", "status", "steps", "evaluations")
BACKWARD = AdjointReport._fields


@dataclass
class Pending:
    """A solve whose arrays are still on the device.

    Attributes:
        arrays: by part ("forward.residual", "backward.pulls", or a metric's name), `(batch,)` or scalars.
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
        self.arrays |= {f"backward.{name}": array for name, array in zip(BACKWARD, report, strict=True)}
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
            size = int(np.prod(array.shape))
            found[index][part] = moved[start : start + size]
            start += size
    return found


def _move(backend: Backend, arrays: Sequence[Array]) -> Host:
    xp = backend.xp
    # float32 holds every count below 2^24 and seven digits of a residual.
    flat = [xp.astype(xp.reshape(backend.detach(array), (-1,)), xp.float32) for array in arrays]
    moved: Host = np.asarray(backend.to_numpy(xp.concat(flat)), np.float64)
    return moved


def values(item: Pending, host: dict[str, Host]) -> dict[str, float]:
    """The metrics of a solve, from its arrays on the host. What was not measured is left out."""
    forward = {part[8:]: array for part, array in host.items() if part.startswith("forward.")}
    backward = {part[9:]: array for part, array in host.items() if part.startswith("backward.")}
    found: dict[str, Any] = dict(item.seconds)
    if forward and forward["status"].size:
        found |= _forward(**forward)
    if backward and backward["status"].size:
        found |= _backward(**backward, reused=item.reused)
    found |= {part: array.mean() for part, array in host.items() if "." not in part}
    return {name: float(value) for name, value in found.items() if not np.isnan(value)}


def _forward(residual: Host, status: Host, steps: Host, evaluations: Host) -> dict[str, Any]:
    known = np.where(np.isnan(residual), np.inf, residual)
    measured = not np.isnan(residual).all()  # a strategy with fixed steps looks at no residual
    broken = (status == int(Status.NONFINITE)) | (status == int(Status.DIVERGED))
    found = {
        "deq_forward_steps": steps.mean(),
        "deq_forward_steps_max": steps.max(),
        "deq_forward_evaluations": evaluations.mean(),
        "deq_nonfinite_fraction": broken.mean(),
    }
    if not measured and not broken.any():
        return found
    return found | {
        "deq_forward_residual": np.median(known),
        "deq_forward_residual_max": known.max(),
        "deq_unconverged_fraction": (status != int(Status.CONVERGED)).mean(),
    }


def _backward(status: Host, pulls: Host, residual: Host, error: Host, fallback: Host, reused: bool) -> dict[str, Any]:
    found = {
        "deq_backward_steps": pulls.mean(),
        "deq_backward_steps_max": pulls.max(),
        "deq_uncertified_fraction": (status != int(Status.CONVERGED)).mean(),
        "deq_fallback_fraction": (fallback > 0).mean(),
    }
    if reused:
        found["deq_refined_fraction"] = (pulls > 1).mean()
    if not np.isnan(residual).all():
        found["deq_backward_residual"] = np.nanmedian(residual)
        found["deq_backward_residual_max"] = np.nanmax(residual)
    if not np.isnan(error).all():
        found["deq_backward_error"] = np.nanmax(error)
    return found
