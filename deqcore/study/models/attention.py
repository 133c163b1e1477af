"""A causal transformer block as a cell, for language models."""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from deqcore.study.models.base import DataKind, Model, Ops, Parameters, Weights, normal
from deqcore.types import Array

HEADS: Final = 4
DAMPING: Final = 0.5


class Attention(Model):
    """a = LN(x + ½ attention(z)), z ← LN(a + ½ relu(a W₁) W₂), with x the embedded words and their positions.

    Source: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models", section 4 (DEQ-Transformer), reduced to one block.
    """

    accepts: ClassVar[tuple[DataKind, ...]] = ("tokens",)

    def initial(self, rng: np.random.Generator) -> Weights:
        """Draw the embeddings, one block, and the readout."""
        length, width = self.shape.sample[0], self.width
        return {
            "E": normal(rng, (self.shape.classes, width), 1.0),
            "P": normal(rng, (length, width), 0.5),
            "Wq": normal(rng, (width, width), width**-0.5),
            "Wk": normal(rng, (width, width), width**-0.5),
            "Wv": normal(rng, (width, width), width**-0.5),
            "Wo": normal(rng, (width, width), DAMPING * width**-0.5),
            "W1": normal(rng, (width, 2 * width), width**-0.5),
            "W2": normal(rng, (2 * width, width), DAMPING * (2 * width) ** -0.5),
            "R": normal(rng, (width, self.shape.classes), width**-0.5),
            "c": np.zeros(self.shape.classes, np.float32),
        }

    def inject(self, ops: Ops, p: Parameters, x: Array) -> Array:
        """Return embedded words and their positions, `(b, length, width)`."""
        return ops.embed(p["E"], x) + p["P"]

    def start(self, ops: Ops, p: Parameters, injected: Array) -> Array:
        """Return zeros."""
        return ops.xp.zeros_like(injected)

    def cell(self, ops: Ops, p: Parameters, z: Array, injected: Array) -> Array:
        """Return one block."""
        xp = ops.xp
        batch, length, width = z.shape

        def heads(matrix: Array) -> Array:
            return xp.permute_dims(xp.reshape(z @ matrix, (batch, length, HEADS, width // HEADS)), (0, 2, 1, 3))

        mixed = ops.attention(heads(p["Wq"]), heads(p["Wk"]), heads(p["Wv"]))
        mixed = xp.reshape(xp.permute_dims(mixed, (0, 2, 1, 3)), (batch, length, width))
        a = ops.layer_norm(injected + DAMPING * (mixed @ p["Wo"]))
        return ops.layer_norm(a + DAMPING * (ops.relu(a @ p["W1"]) @ p["W2"]))

    def read(self, ops: Ops, p: Parameters, z: Array) -> Array:
        """Return the logits of the next word, `(b, length, words)`."""
        return z @ p["R"] + p["c"]


class AttentionExplicit(Attention):
    """The same weights, the block applied twice."""

    equilibrium: ClassVar[bool] = False
