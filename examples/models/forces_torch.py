"""The force field in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from deqcore_torch.nn import DEQ
from forces import BASIS, CENTRES, SPREAD, WIDTH
from torch import Tensor, nn


class Cell(nn.Module):
    """z ← tanh(x + own z + Σⱼ filter(rᵢⱼ) ⊙ other zⱼ) for states `(batch, atoms, width)`."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(WIDTH, WIDTH, bias=False)
        self.other = nn.Linear(WIDTH, WIDTH, bias=False)
        self.filter = nn.Linear(BASIS, WIDTH, bias=False)

    def forward(self, z: Tensor, x: Tensor, radial: Tensor) -> Tensor:
        return torch.tanh(x + self.own(z) + (self.filter(radial) * self.other(z)[:, None]).sum(2))


class Model(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.pair = nn.Linear(BASIS, 1, bias=False)
        self.inject = nn.Linear(BASIS, WIDTH)
        self.deq = DEQ(Cell(), **settings)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.read = nn.Linear(WIDTH, 1, bias=False)

    def energy(self, positions: Tensor) -> Tensor:
        between = positions[:, :, None] - positions[:, None]
        alone = torch.eye(positions.shape[1], device=positions.device)
        centres = torch.tensor(CENTRES, device=positions.device)
        r = (between.square().sum(-1) + alone).sqrt()  # the root has no derivative at 0
        radial = torch.exp(-(((r[..., None] - centres) / SPREAD) ** 2) / 2) * (1 - alone)[..., None]
        z = self.deq(self.inject(radial.sum(2)), radial)
        return self.read(torch.tanh(self.hidden(z))).sum((1, 2)) + self.pair(radial).sum((1, 2, 3))

    def forces(self, positions: Tensor, create_graph: bool) -> Tensor:
        positions = positions.requires_grad_()
        (slope,) = torch.autograd.grad(self.energy(positions).sum(), positions, create_graph=create_graph)
        return -slope

    def loss(self, positions: Tensor, target: Tensor) -> Tensor:
        return (self.forces(positions, create_graph=True) - target).square().mean()

    def predict(self, positions: Tensor) -> Tensor:
        return self.forces(positions, create_graph=False)
