"""The recurrent-depth language model in PyTorch, and the same loop by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from deqcore_torch.nn import DEQ
from looped_text import DEPTH, HIDDEN, RECORDED, SEED, WIDTH
from text import LENGTH, WORDS
from text_torch import Block, Layer, norm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Core(Block):
    """One step of the loop, on states `(batch, length, width)`; `e` is the text as the prelude has encoded it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(width, hidden)
        self.adapter = nn.Linear(2 * width, width, bias=False)

    def forward(self, z: Tensor, e: Tensor) -> Tensor:
        h = self.adapter(torch.cat([z, e], -1))
        h = h + self.attend(norm(h))
        return norm(h + self.think(norm(h)))


class Model(nn.Module):
    def __init__(self, settings: dict[str, Any], width: int = WIDTH, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.place = nn.Parameter(torch.zeros(LENGTH, width))
        self.prelude = Layer(width, hidden)
        self.deq = DEQ(Core(width, hidden), **settings)
        self.coda = Layer(width, hidden)
        self.read = nn.Linear(width, WORDS)

    def loop(self, e: Tensor, step: int) -> Tensor:
        """Return the last state of the loop at a training step."""
        return self.deq.solve(e, backward__step=step).value

    def predict(self, windows: Tensor, step: int = 0) -> Tensor:
        """Return the negative log-probability of each next character, `(batch, length)`."""
        e = norm(self.prelude(self.embed(windows[:, :-1]) + self.place))
        logits = self.read(norm(self.coda(self.loop(e, step))))
        return cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")

    def loss(self, windows: Tensor, step: Tensor) -> Tensor:
        return self.predict(windows, int(step)).mean()


class ByHand(Model):
    """The same model without deqcore's loop."""

    def depth(self, step: int) -> int:
        """Draw the number of steps, the same on all ranks and after a restart."""
        rng = np.random.default_rng((SEED, step))
        return 1 + int(rng.poisson(rng.lognormal(math.log(DEPTH - 1) - 0.5**2 / 2, 0.5)))

    def loop(self, e: Tensor, step: int) -> Tensor:
        z, depth = torch.zeros_like(e), self.depth(step)
        with torch.no_grad():
            for _ in range(depth - RECORDED):
                z = self.deq.cell(z, e)
        for _ in range(min(depth, RECORDED)):
            z = self.deq.cell(z, e)
        return z
