"""The refining block in PyTorch, and the same refinement by hand."""

from __future__ import annotations

from typing import Any

import torch
from attractor import HIDDEN, LAYERS, RTOL, STEPS, WIDTH
from deqcore_torch.nn import DEQ
from text import LENGTH, WORDS
from text_torch import Cell, Layer, norm
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Model(nn.Module):
    def __init__(self, settings: dict[str, Any], width: int = WIDTH, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.place = nn.Parameter(torch.zeros(LENGTH, width))
        self.cells = nn.Sequential(*(Layer(width, hidden) for _ in range(LAYERS)))
        self.deq = DEQ(Cell(width, hidden), **settings)
        self.read = nn.Linear(width, WORDS)

    def refine(self, h: Tensor, step: int) -> Tensor:
        """Return the equilibrium that is reached from h, at a training step."""
        return self.deq.solve(h, z0=h, backward__step=step).value

    def predict(self, windows: Tensor, step: int = 0) -> Tensor:
        """Return the negative log-probability of each next character, `(batch, length)`."""
        h = norm(self.cells(self.embed(windows[:, :-1]) + self.place))
        return cross_entropy(self.read(self.refine(h, step)).transpose(1, 2), windows[:, 1:], reduction="none")

    def loss(self, windows: Tensor, step: Tensor) -> Tensor:
        return self.predict(windows, int(step)).mean()


class ByHand(Model):
    """The same model without deqcore's solve and gradient."""

    def refine(self, h: Tensor, step: int, steps: int = STEPS, rtol: float = RTOL) -> Tensor:
        cell, z = self.deq.cell, h.detach()
        with torch.no_grad():
            for _ in range(steps):
                before, z = z, cell(z, h)
                if ((z - before).flatten(1).norm(dim=1) <= rtol * z.flatten(1).norm(dim=1)).all():
                    break
        z = cell(z, h)
        if z.requires_grad:
            at = z.detach().requires_grad_()
            once_more = cell(at, h)
            z.register_hook(lambda g: g + torch.autograd.grad(once_more, at, g, retain_graph=True)[0])
        return z
