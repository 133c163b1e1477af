"""The contract of a backend for studies: one training step in parts, and the weights to save.

The loop around it (order of samples, rates, clock, audits, checkpoints) is `loop.py`, the same for all backends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deqcore.config import Config
from deqcore.study.models.base import Model, Weights
from deqcore.types import AdjointReport, Status

Numbers: TypeAlias = NDArray[Any]

# Adam's constants: both frameworks' own defaults, written out since they must agree.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Figures(NamedTuple):
    """What the solves of one step did. Means are over samples, most is the worst sample: what a batch pays for.

    `None` is what was not measured: an explicit network has no residual, a step strategy no vjps.
    """

    evaluations: float
    evaluations_most: int
    residual: float | None
    unconverged: float
    vjps: float | None
    vjps_most: int | None
    adjoint_residual: float | None
    error: float | None
    fallback: float

    @classmethod
    def of(cls, steps: Any, scale: Any, report: AdjointReport | None) -> Figures:
        """Sum up arrays on the host.

        Args:
            steps: evaluations, residual and status of the forward solve, each `(batch,)`.
            scale: ‖f(z*)‖ `(batch,)`.
            report: of the backward pass, or None.
        """
        evaluations, residual, status = steps
        relative = np.asarray(residual) / np.maximum(np.asarray(scale), 1e-30)
        forward = (
            float(np.mean(evaluations)) + 1,  # one more evaluation records the gradient
            int(np.max(evaluations)) + 1,
            _finite(np.max(relative)),
            float(np.mean(np.asarray(status) != int(Status.CONVERGED))),
        )
        if report is None:
            return cls(*forward, None, None, None, None, 0.0)
        vjps = np.asarray(report.vjps)
        return cls(
            *forward,
            float(vjps.mean()),
            int(vjps.max()),
            _mean(report.residual),
            _mean(report.error),
            float(np.mean(report.fallback)),
        )

    @classmethod
    def explicit(cls, depth: int) -> Figures:
        """Return the figures of a network that applies its cell `depth` times and differentiates through them."""
        return cls(float(depth), depth, None, 0.0, float(depth), depth, None, None, 0.0)


@dataclass(frozen=True)
class Step:
    """One training step.

    Attributes:
        loss: mean over the batch, before the update.
        forward: seconds until the loss is there. `backward`: until the gradients are. `update`: the optimiser.
        figures: what the solves did.
    """

    loss: float
    forward: float
    backward: float
    update: float
    figures: Figures


class Trainer(ABC):
    """A model's weights on one backend, and Adam.

    Args:
        model: what is trained.
        weights: where it starts; copied.
        config: of its solves; names the backend.
        device: where the weights go; "auto" is the framework's GPU if it has one.

    Raises:
        BackendError: the device does not exist.
    """

    @abstractmethod
    def __init__(self, model: Model, weights: Weights, config: Config, device: str = "auto") -> None:
        """Copy the weights to the framework."""

    @abstractmethod
    def device(self) -> str:
        """Return what the device is called, for the report: "cpu", or a GPU's model."""

    @abstractmethod
    def warm_up(self, x: Numbers, y: Numbers, count: int) -> None:
        """Compile and touch everything that `step` and `predict` need; changes neither weights nor optimiser.

        Args:
            x: inputs of one batch.
            y: its targets.
            count: samples that `predict` will be given.
        """

    @abstractmethod
    def step(self, x: Numbers, y: Numbers, rate: float) -> Step:
        """Take one step of Adam at this rate. The device is waited for before each reading of the clock."""

    @abstractmethod
    def predict(self, x: Numbers) -> Numbers:
        """Return the logits, float32, on the host."""

    @abstractmethod
    def gradient(self, x: Numbers, y: Numbers, config: Config) -> tuple[float, Numbers]:
        """Return the loss, and its gradient for all weights as one vector, in the order of their names."""

    @abstractmethod
    def radius(self, x: Numbers, config: Config, products: int) -> Numbers:
        """Spectral radius of the Jacobian at the solution, per sample, from so many products at most."""

    @abstractmethod
    def save(self) -> Weights:
        """Return everything that `restore` needs: weights as `weight.NAME`, and Adam's state."""

    @abstractmethod
    def restore(self, saved: Weights) -> None:
        """Go back to where `save` was called. `save` and `restore` change no bit of what follows."""

    def reset_peak(self) -> None:  # noqa: B027 - a backend without a device has nothing to do
        """Restart the measurement of the device's peak memory."""

    def peak(self) -> int | None:
        """Return the peak memory of the device in bytes since `reset_peak`; None if the host is the only device."""
        return None

    def step_memory(self, x: Numbers, y: Numbers) -> int | None:
        """Return the most bytes that the framework's allocator holds for one step, beyond what it held before.

        The count is the allocator's own, so that it repeats. The step may change the optimiser's state. None if the
        framework does not count.
        """
        return None


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _mean(values: Any) -> float | None:
    values = np.asarray(values, dtype=np.float64)
    available = values[np.isfinite(values)]
    return float(available.mean()) if available.size else None
