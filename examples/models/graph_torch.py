"""The implicit graph network in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from deqcore_torch.nn import DEQ
from graph import FEATURES, GROUPS, RADIUS, WIDTH
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Cell(nn.Module):
    """z ← relu(Â z Wᵀ + x) for states `(nodes, width)`, ‖W‖∞ at most `RADIUS`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))

    def forward(self, z: Tensor, x: Tensor, adjacency: Tensor) -> Tensor:
        scale = (RADIUS / self.weight.abs().sum(1).max()).clamp(max=1.0)
        return torch.relu(adjacency @ (z @ (scale * self.weight).T) + x)


class Model(nn.Module):
    def __init__(self, settings: dict[str, Any], explicit: bool = False) -> None:
        super().__init__()
        self.inject = nn.Linear(FEATURES, WIDTH)
        self.deq = DEQ(Cell(), **settings)
        self.read = nn.Linear(WIDTH, GROUPS)
        self.explicit = explicit

    def forward(self, adjacency: Tensor, features: Tensor) -> Tensor:
        x = self.inject(adjacency @ features)
        if self.explicit:
            hidden = torch.relu(adjacency @ (torch.relu(x) @ self.deq.cell.weight.T))
            return self.read(adjacency @ hidden)
        return self.read(self.deq(x, adjacency))

    def loss(self, adjacency: Tensor, features: Tensor, groups: Tensor, train: Tensor) -> Tensor:
        return cross_entropy(self(adjacency, features)[train], groups[train])

    def predict(self, adjacency: Tensor, features: Tensor) -> Tensor:
        with torch.no_grad():
            return self(adjacency, features)
