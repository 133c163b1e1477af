"""The looped reasoner in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from deqcore_torch.nn import DEQ
from sudoku import HIDDEN, SURE, WIDTH, peers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Cell(nn.Module):
    """z ← tanh(x + update(relu(message(own state, the mean of each group, the mean over digits)))).

    z is `(batch, 16, 4, width)`: cells, digits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Linear(5 * WIDTH, HIDDEN)
        self.update = nn.Linear(HIDDEN, WIDTH)
        self.register_buffer("peers", torch.tensor(peers()), persistent=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        groups = torch.einsum("gij,bjkd->gbikd", self.peers, z)
        seen = torch.cat([z, *groups, z.mean(2, keepdim=True).expand_as(z)], -1)
        return torch.tanh(x + self.update(torch.relu(self.message(seen))))


class Model(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.inject = nn.Linear(2, WIDTH)
        self.deq = DEQ(Cell(), **settings)
        self.read = nn.Linear(WIDTH, 1, bias=False)

    def loss(self, clues: Tensor, answers: Tensor) -> Tensor:
        logits = self.read(self.deq(self.inject(clues))).squeeze(-1)
        return cross_entropy(logits.flatten(0, 1), answers.flatten())

    def predict(self, clues: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the digits, the steps that each puzzle took, and whether it halted by itself."""
        with torch.no_grad():
            solution = self.deq.solve(self.inject(clues), until=self.sure)
            return self.read(solution.value).squeeze(-1).argmax(-1), solution.steps, solution.converged

    def sure(self, z: Tensor, fz: Tensor) -> Tensor:
        """Return whether every digit of a puzzle is sure."""
        return self.read(fz).squeeze(-1).softmax(-1).amax(-1).amin(-1) > SURE
