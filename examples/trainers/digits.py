"""What the three examples share: handwritten digits, a classifier with an equilibrium layer, the command line."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from deqcore_torch.nn import DEQ
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

WIDTH, BATCH, ACCUMULATE, RATE = 48, 25, 2, 3e-3


class Cell(nn.Module):
    """z ← tanh(W z + x)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        nn.init.normal_(self.linear.weight, std=0.4 / WIDTH**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)

    def initial_state(self, x: Tensor) -> Tensor:
        """Return zeros in float32: under autocast x is bfloat16, and so would be a state like it."""
        return torch.zeros_like(x, dtype=torch.float32)


class Classifier(nn.Module):
    """Ten logits of an image `(batch, 64)`."""

    def __init__(self) -> None:
        super().__init__()
        self.inject = nn.Linear(64, WIDTH)
        self.deq = DEQ(Cell(), backward__strategy="broyden-reuse", backward__options={"max_relative_error": 0.1})
        self.read = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.read(self.deq(self.inject(images)))


def data() -> tuple[TensorDataset, TensorDataset]:
    """1500 images to train with, 297 to test with."""
    digits: Any = load_digits()
    images = torch.tensor(digits.data / 8.0 - 1.0, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    return TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])


def accuracy(model: nn.Module, test: TensorDataset) -> float:
    """Share of the test images that are classified correctly."""
    images, labels = test.tensors
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def arguments(text: str | None, given: list[str] | None) -> argparse.Namespace:
    """Parse the command line of each example."""
    parser = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6, help="in all, those before a restart included")
    parser.add_argument("--out", type=Path, default=Path("trained"), help="folder of the checkpoints and the log")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in that folder")
    parser.add_argument(
        "--precision", choices=("32", "bf16"), default="bf16", help="of everything but the solver's state"
    )
    options = parser.parse_args(given)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1 (got {options.epochs})")
    return options


def last(folder: Path, pattern: str) -> Path:
    """Return the newest checkpoint of a folder, by the number at the end of its name."""
    found = sorted(folder.glob(pattern), key=lambda path: int(re.findall(r"\d+", path.name)[-1]))
    if not found:
        raise SystemExit(f"--resume: {folder} holds no {pattern}. Train without --resume first, or name its --out.")
    return found[-1]
