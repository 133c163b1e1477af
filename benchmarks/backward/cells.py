"""The cells: f, an input, an initial iterate and a cotangent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from deqcore_torch.study import TorchOps
from torch import Tensor

from benchmarks.cells import attention, conv
from deqcore.study.models.base import Shape
from deqcore.study.models.conv import Conv

SIZES: Final = {"dense": (256, 512), "dense 128": (256, 128), "dense, small": (64, 64), "slow modes": (64, 256)}
QUICK: Final = {"dense": (16, 64), "dense 128": (8, 32), "dense, small": (4, 16), "slow modes": (4, 32)}
BLOCKS: Final = ("convolution", "attention")
SCALES: Final = "two scales"
CELLS: Final = (*SIZES, *BLOCKS, SCALES)


@dataclass(frozen=True)
class Cell:
    """f(z, x) with recorded parameters.

    Attributes:
        name: for the table.
        f: `(z, x)` to f(z).
        x: input.
        z0: initial iterate.
        g: cotangent.
    """

    name: str
    f: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    z0: Tensor
    g: Tensor


def dense(name: str, batch: int, width: int) -> Cell:
    """tanh(W z + x) with random weights of spectral radius 0.9."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(0.9 * torch.randn(width, width, generator=generator) / width**0.5)
    x, g = torch.randn(2, batch, width, generator=generator).unbind(0)
    return Cell(f"{name} {batch}×{width}", lambda z, x: torch.tanh(z @ weight.T + x), x, torch.zeros_like(x), g)


def slow_modes(name: str, batch: int, width: int, slow: int = 10) -> Cell:
    """W z + x with ten eigenvalues from .9 to .99 and the others from −.5 to .5."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    values = torch.cat([torch.linspace(0.9, 0.99, slow), torch.linspace(-0.5, 0.5, width - slow)])
    weight = torch.nn.Parameter(q * values @ q.T)
    x, g = torch.randn(2, batch, width, generator=generator).unbind(0)
    return Cell(f"{name} {batch}×{width}", lambda z, x: z @ weight.T + x, x, torch.zeros_like(x), g)


def cell_of(name: str, quick: bool) -> Cell:
    """Return the cell of this name."""
    if name in BLOCKS:
        return block(name, quick)
    if name == SCALES:
        return two_scales(*((4, 8) if quick else (64, 16)))
    batch, width = (QUICK if quick else SIZES)[name]
    return (slow_modes if name == "slow modes" else dense)(name, batch, width)


def block(name: str, quick: bool) -> Cell:
    """Return the convolutional or the attention block of the other benchmarks."""
    make: Any = conv if name == "convolution" else attention
    problem = (make(4, 16) if quick else make()).problem
    params = {key: torch.nn.Parameter(torch.tensor(np.asarray(p))) for key, p in problem.params.items()}
    x = torch.tensor(np.asarray(problem.inputs))
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    f = problem.f["torch"]
    return Cell(f"{name} {'×'.join(map(str, x.shape))}", lambda z, x: f(params, z, x), x, torch.zeros_like(x), g)


def two_scales(batch: int, side: int, gain: float = 2.0) -> Cell:
    """Return the study's convolutions on two scales, 8 and 16 channels wide, as one tensor.

    The kernels of the cell are `gain` times the initial ones: then an exact solve takes about as many vjps as in the
    study's training on images.
    """
    model = Conv(Shape("image", (3, side, side), 10), width=8)
    weights = model.initial(np.random.default_rng(0))
    scaled = {key: gain * value if key.startswith("K") else value for key, value in weights.items()}
    params = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in scaled.items()}
    ops, generator = TorchOps(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        first, second = model.inject(ops, params, torch.randn(batch, 3, side, side, generator=generator))
    x, low = torch.cat([first.flatten(1), second.flatten(1)], 1), first[0].numel()
    g = torch.randn(x.shape, generator=generator)

    def f(z: Tensor, x: Tensor) -> Tensor:
        states, inputs = [(part[:, :low].reshape(first.shape), part[:, low:].reshape(second.shape)) for part in (z, x)]
        return torch.cat([part.flatten(1) for part in model.cell(ops, params, states, inputs)], 1)

    return Cell(f"{SCALES} {batch}×{side}×{side}", f, x, torch.zeros_like(x), g)
