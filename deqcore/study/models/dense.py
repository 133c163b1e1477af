"""A dense cell: z ← tanh(z W + x U + b)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final

import numpy as np

from deqcore.study.models.base import DataKind, Model, Ops, Parameters, Weights, contraction, normal
from deqcore.types import Array

RATE: Final = 0.8


class Dense(Model):
    """z ← tanh(z W + x U + b) on the raveled input.

    At the start ‖W‖₂ = 0.8; tanh does not expand, so the cell is a contraction for every input. Training may leave
    that region: what becomes of the spectral radius is measured, not assumed.
    """

    accepts: ClassVar[tuple[DataKind, ...]] = ("vector", "image")

    def initial(self, rng: np.random.Generator) -> Weights:
        """W, U, b and the readout R, c."""
        inputs = math.prod(self.shape.sample)
        return {
            "W": contraction(rng, self.width, RATE),
            "U": normal(rng, (inputs, self.width), inputs**-0.5),
            "b": np.zeros(self.width, np.float32),
            "R": normal(rng, (self.width, self.shape.classes), self.width**-0.5),
            "c": np.zeros(self.shape.classes, np.float32),
        }

    def inject(self, ops: Ops, p: Parameters, x: Array) -> Array:
        """X U + b."""
        return ops.xp.reshape(x, (x.shape[0], -1)) @ p["U"] + p["b"]

    def start(self, ops: Ops, p: Parameters, injected: Array) -> Array:
        """Return zeros."""
        return ops.xp.zeros_like(injected)

    def cell(self, ops: Ops, p: Parameters, z: Array, injected: Array) -> Array:
        """Tanh(z W + injected)."""
        return ops.xp.tanh(z @ p["W"] + injected)

    def read(self, ops: Ops, p: Parameters, z: Any) -> Array:
        """Z R + c."""
        return z @ p["R"] + p["c"]


class DenseExplicit(Dense):
    """The same weights as two explicit layers: tanh(tanh(x U + b) W + x U + b)."""

    equilibrium: ClassVar[bool] = False
