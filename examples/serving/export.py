"""Write an equilibrium model as a program of plain operators, with a dynamic batch."""

from __future__ import annotations

import sys

import torch
from deqcore_torch.nn import DEQ

WIDTH = 8


class Cell(torch.nn.Module):
    """z ← tanh(W z + x)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        torch.nn.init.normal_(self.linear.weight, std=0.5 / WIDTH**0.5)

    def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(z) + x)


class Model(torch.nn.Module):
    """Returns a score per sample, and whether its equilibrium was found."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = DEQ(Cell(), evaluation={"forward__rtol": 1e-5})
        self.head = torch.nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        solution = self.layer.solve(x)
        return self.head(solution.value)[:, 0], solution.status == 1  # 1 is CONVERGED


def make() -> Model:
    """Return the model; a real program would load trained weights here."""
    torch.manual_seed(0)
    return Model().eval()


def write(path: str) -> None:
    """Export the model to a file."""
    batch = torch.export.Dim("batch", max=1024)
    program = torch.export.export(make(), (torch.randn(4, WIDTH),), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


if __name__ == "__main__":
    write(sys.argv[1])
