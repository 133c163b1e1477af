"""The multiscale image classifier in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from deqcore_torch.nn import DEQ
from images import NORM_GROUPS, WIDTH
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, group_norm, interpolate, relu

States = tuple[Tensor, Tensor]


class Cell(nn.Module):
    """Messages from both resolutions, added to the image's features; group norms keep the states bounded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.low_low = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.high_low = nn.Conv2d(2 * width, width, 3, padding=1, bias=False)
        self.low_high = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.high_high = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False)

    def forward(self, z: States, x: States) -> States:
        low, high = relu(z[0]), relu(z[1])
        first = self.low_low(low) + interpolate(self.high_low(high), scale_factor=2)
        second = self.low_high(low) + self.high_high(high)
        return group_norm(x[0] + first, NORM_GROUPS), group_norm(x[1] + second, NORM_GROUPS)


class Model(nn.Module):
    """The equilibrium of one cell, or `blocks` cells one after the other."""

    def __init__(self, settings: dict[str, Any], width: int = WIDTH, blocks: int = 0) -> None:
        super().__init__()
        self.low = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.high = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        if blocks:
            self.cells = nn.ModuleList(Cell(width) for _ in range(blocks))
        else:
            self.deq = DEQ(Cell(width), **settings)
        self.blocks = blocks
        self.read = nn.Linear(12 * width, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Any]:
        low = group_norm(self.low(images), NORM_GROUPS)
        x = low, group_norm(self.high(relu(low)), NORM_GROUPS)
        z, solution = x, None
        if self.blocks:
            for cell in self.cells:
                z = cell(z, x)
        else:
            solution = self.deq.solve(x)
            z = solution.value
        return self.read(torch.cat([adaptive_avg_pool2d(relu(state), 2).flatten(1) for state in z], 1)), solution

    def loss(self, images: Tensor, digits: Tensor) -> Tensor:
        return cross_entropy(self(images)[0], digits)

    def predict(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits and, for the equilibrium model, the steps of each solve and whether it converged."""
        with torch.no_grad():
            logits, solution = self(images)
        return (logits,) if solution is None else (logits, solution.steps, solution.converged)
