"""The deblurring model in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from deblurring import CHANNELS, modes
from deqcore_torch.nn import DEQ
from torch import Tensor, nn
from torch.nn.functional import relu


class Cell(nn.Module):
    """z ← (AᵀA + λ)⁻¹ (Aᵀ y + λ D(z)), D(z) = z/2 + a small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.log_weight = nn.Parameter(torch.zeros(1))
        self.first = nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.third = nn.Conv2d(CHANNELS, 1, 3, padding=1, bias=False)
        for name, value in zip(("vectors", "values"), modes(), strict=True):
            self.register_buffer(name, torch.tensor(value), persistent=False)

    def denoise(self, z: Tensor) -> Tensor:
        return 0.5 * z + self.third(relu(self.second(relu(self.first(z)))))

    def forward(self, z: Tensor, blurred: Tensor) -> Tensor:
        q, gains, weight = self.vectors, torch.outer(self.values, self.values), self.log_weight.exp()
        wanted = gains * (q.T @ blurred @ q) + weight * (q.T @ self.denoise(z) @ q)
        return q @ (wanted / (gains**2 + weight)) @ q.T


class Model(nn.Module):
    """Starts each solve at the blurred image."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.deq = DEQ(Cell(), **settings)

    def loss(self, blurred: Tensor, sharp: Tensor) -> Tensor:
        return 100 * (self.deq(blurred, z0=blurred) - sharp).square().mean()

    def predict(self, blurred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images, the steps that each took, and whether it converged."""
        with torch.no_grad():
            solution = self.deq.solve(blurred, z0=blurred)
        return solution.value, solution.steps, solution.converged
