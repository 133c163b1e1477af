"""A multiscale convolutional cell: two resolutions that exchange features, like a small MDEQ."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import numpy as np

from deqcore.study.models.base import DataKind, Model, Ops, Parameters, Weights, normal
from deqcore.types import Array

GROUPS: Final = 4
DAMPING: Final = 0.5


class Conv(Model):
    """States at full and at half resolution, `(b, w, h, w)` and `(b, 2w, h/2, w/2)`.

    z₁ ← GN(x₁ + ½(K₁₁∗relu(z₁) + up(K₂₁∗relu(z₂))), and z₂ with a strided convolution from z₁ in the same way. The
    group norm keeps the state bounded; the kernels start small, so that the cell contracts at the start (measured, 2
    random inputs: spectral radius about 0.5).

    Source: Bai, Koltun & Kolter (2020), "Multiscale Deep Equilibrium Models", reduced to two scales.
    """

    accepts: ClassVar[tuple[DataKind, ...]] = ("image",)

    def initial(self, rng: np.random.Generator) -> Weights:
        """Return kernels, biases and the readout."""
        channels, (low, high) = self.shape.sample[0], (self.width, 2 * self.width)

        def kernel(out: int, into: int, gain: float) -> Any:
            return normal(rng, (out, into, 3, 3), gain * (2 / (9 * into)) ** 0.5)

        return {
            "X1": kernel(low, channels, 1.0),
            "X2": kernel(high, low, 1.0),
            "K11": kernel(low, low, DAMPING),
            "K12": kernel(high, low, DAMPING),
            "K21": kernel(low, high, DAMPING),
            "K22": kernel(high, high, DAMPING),
            "b1": np.zeros((low, 1, 1), np.float32),
            "b2": np.zeros((high, 1, 1), np.float32),
            "R": normal(rng, (low + high, self.shape.classes), (low + high) ** -0.5),
            "c": np.zeros(self.shape.classes, np.float32),
        }

    def inject(self, ops: Ops, p: Parameters, x: Array) -> tuple[Array, Array]:
        """Return features of the input at both resolutions."""
        first = ops.norm(ops.conv(x, p["X1"]) + p["b1"], GROUPS)
        return first, ops.norm(ops.conv(ops.relu(first), p["X2"], 2) + p["b2"], GROUPS)

    def start(self, ops: Ops, p: Parameters, injected: tuple[Array, Array]) -> tuple[Array, Array]:
        """Return zeros."""
        return ops.xp.zeros_like(injected[0]), ops.xp.zeros_like(injected[1])

    def cell(self, ops: Ops, p: Parameters, z: tuple[Array, Array], injected: tuple[Array, Array]) -> Any:
        """Return one exchange between the resolutions."""
        low, high = ops.relu(z[0]), ops.relu(z[1])
        first = ops.conv(low, p["K11"]) + ops.upsample(ops.conv(high, p["K21"]))
        second = ops.conv(low, p["K12"], 2) + ops.conv(high, p["K22"])
        return (
            ops.norm(injected[0] + DAMPING * first, GROUPS),
            ops.norm(injected[1] + DAMPING * second, GROUPS),
        )

    def read(self, ops: Ops, p: Parameters, z: tuple[Array, Array]) -> Array:
        """Return means over space of both resolutions, and a linear map."""
        pooled = [ops.xp.mean(ops.relu(part), axis=(2, 3)) for part in z]
        return ops.xp.concat(pooled, axis=1) @ p["R"] + p["c"]


class ConvExplicit(Conv):
    """The same weights, the cell applied twice."""

    equilibrium: ClassVar[bool] = False
