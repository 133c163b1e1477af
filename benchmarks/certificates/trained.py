"""Fixed-point cells trained to convergence on real data, with the cotangents of their own loss."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import deqcore
from benchmarks.certificates.problems import OWN, AttentionCell, Case, ConvCell, of_module

CONVERGED = 0.02  # training loss at which a cell counts as trained to convergence; all classes are as good as certain
RTOL = 1e-3
FEW = 200  # images that the convolution and attention cells memorise
BATCH = 50
STEPS = 1000  # at most; six minutes for all cells allow no more


class TanhCell(nn.Module):
    """tanh(W z + x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        with torch.no_grad():
            self.inner.weight.mul_(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


class Classifier(nn.Module):
    """Encoder, fixed-point cell, linear readout."""

    def __init__(self, encoder: nn.Module, cell: nn.Module, shape: tuple[int, ...], classes: int = 10) -> None:
        super().__init__()
        self.encoder, self.cell, self.shape = encoder, cell, shape
        self.readout = nn.Linear(int(np.prod(shape)), classes)

    def inject(self, images: Tensor) -> Tensor:
        return self.encoder(images).reshape(len(images), *self.shape)

    def forward(self, images: Tensor) -> Tensor:
        x = self.inject(images)
        result = deqcore.fixed_point(self.cell, torch.zeros_like(x), x, config=TRAINING)
        return self.readout(result.value.flatten(1))


TRAINING = deqcore.Config(
    backend="torch",
    forward={"solver": "broyden", "rtol": RTOL, "max_steps": 40, "on_failure": "ignore"},
    backward={"strategy": "broyden-reuse", "options": {"max_relative_error": 0.1}},
)


@dataclass(frozen=True)
class Training:
    """How a cell was trained.

    Attributes:
        name: of the cell.
        epochs: until the loss was small enough, or the budget was spent.
        loss: mean over the last epoch.
        accuracy: on the training images.
    """

    name: str
    epochs: int
    loss: float
    accuracy: float


def digits() -> tuple[Tensor, Tensor]:
    """Return the 1,797 handwritten digits that scikit-learn carries, 8×8, standardised."""
    from sklearn.datasets import load_digits

    result = load_digits()
    images = torch.tensor(result.images, dtype=torch.float32)[:, None] / 8.0 - 1.0
    return images, torch.tensor(result.target)


def image_folder(path: Path, limit: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Load `limit` images from a folder of class folders, evenly from ten classes, scaled to `side`×`side`."""
    from PIL import Image

    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())[:10]
    images, labels = [], []
    for label, folder in enumerate(folders):
        for file in sorted(folder.iterdir())[: limit // len(folders)]:
            with Image.open(file) as image:
                small = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
                images.append(np.asarray(small, np.float32).transpose(2, 0, 1) / 64.0 - 2.0)
            labels.append(label)
    return torch.tensor(np.stack(images)), torch.tensor(labels)


def dense_on_digits(samples: int) -> tuple[Case, Training]:
    """Trained on all digits."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 128))
    return _trained("tanh cell 128, digits", encoder, TanhCell(128), (128,), digits(), samples)


def conv_on_digits(samples: int) -> tuple[Case, Training]:
    """Train a cell to memorise a few digits."""
    stem = nn.Conv2d(1, 8, 3, padding=1)
    return _trained("conv cell, digits", stem, ConvCell(8), (8, 8, 8), _few(digits()), samples)


def attention_on_digits(samples: int) -> tuple[Case, Training]:
    """Train on all digits; a token is a line of the image."""
    tokens = nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (8, 8)), nn.Flatten(1, 2), nn.Linear(8, 24))
    return _trained("attention cell, digits", tokens, AttentionCell(8, 24), (8, 24), _few(digits()), samples)


def conv_on_images(samples: int, path: Path) -> tuple[Case, Training]:
    """Train a cell to memorise a few images of a folder."""
    stem = nn.Conv2d(3, 8, 3, padding=1, stride=2)
    name = f"conv cell, images of {path.resolve().parent.name}/{path.name}"
    return _trained(name, stem, ConvCell(8), (8, 8, 8), image_folder(path, FEW), samples)


def _few(data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return data[0][:FEW], data[1][:FEW]


def _trained(
    name: str,
    encoder: nn.Module,
    cell: nn.Module,
    shape: tuple[int, ...],
    data: tuple[Tensor, Tensor],
    samples: int,
) -> tuple[Case, Training]:
    torch.manual_seed(1)
    for layer in (*encoder.modules(), *cell.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d) and not isinstance(cell, TanhCell):
            layer.reset_parameters()
    model = Classifier(encoder, cell, shape)
    inputs, labels = data
    training = _fit(name, model, inputs, labels)
    chosen = torch.linspace(0, len(inputs) - 1, samples).long()
    return _case(name, model, inputs[chosen], labels[chosen]), training


def _fit(name: str, model: Classifier, inputs: Tensor, labels: Tensor) -> Training:
    """Adam until the loss is small, or the epochs are spent."""
    epochs = STEPS * BATCH // len(inputs)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(2)
    epoch, loss, right = 0, float("inf"), 0
    while epoch < epochs and loss > CONVERGED:
        total, right = 0.0, 0
        for rows in torch.randperm(len(inputs), generator=generator).split(BATCH):
            optimizer.zero_grad()
            scores = model(inputs[rows])
            value = nn.functional.cross_entropy(scores, labels[rows])
            value.backward()
            optimizer.step()
            total += float(value.detach()) * len(rows)
            right += int((scores.argmax(1) == labels[rows]).sum())
        schedule.step()
        epoch, loss = epoch + 1, total / len(inputs)
    return Training(name, epoch, loss, right / len(inputs))


def _case(name: str, model: Classifier, inputs: Tensor, labels: Tensor) -> Case:
    """Return the cell at these inputs; g = dL/dz* of each sample's own loss."""
    with torch.no_grad():
        x = model.inject(inputs)
        z = deqcore.fixed_point(model.cell, torch.zeros_like(x), x, config=TRAINING).value
    z = z.requires_grad_()
    loss = nn.functional.cross_entropy(model.readout(z.flatten(1)), labels, reduction="sum")
    (g,) = torch.autograd.grad(loss, z)
    return of_module(name, OWN, copy.deepcopy(model.cell), x, g)
