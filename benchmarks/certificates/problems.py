"""Fixed-point problems in PyTorch, each a batch of samples with a cotangent.

Every problem is given twice, in float32 for deqcore and in float64 for the verification.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

N = 200


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        name: for tables.
        kind: "random cotangents" or "own cotangents" (of a trained cell's loss).
        narrow: f in float32, `(batch, …)` to `(batch, …)`.
        wide: the same f in float64.
        z0: initial iterate, float32.
        g: cotangents, like z0.
    """

    name: str
    kind: str
    narrow: Callable[[Tensor], Tensor]
    wide: Callable[[Tensor], Tensor]
    z0: Tensor
    g: Tensor


def linear_problems(samples: int, seed: int = 0) -> Iterator[Case]:
    """Yield random spectra; sample i of each has the seed `seed + i`."""
    linear = partial(_linear, seed=seed)
    for rho in (0.5, 0.9, 0.99):
        yield linear(f"dense, ρ {rho}", samples, lambda r, rho=rho: rho * r.standard_normal((N, N)) / np.sqrt(N))
    yield linear("non-normal", samples, non_normal)
    yield linear("1 slow mode .97", samples, lambda r: slow(r, [0.97]))
    yield linear("5 slow modes .95–.99", samples, lambda r: slow(r, np.linspace(0.95, 0.99, 5)))
    yield linear("20 slow modes .95–.99", samples, lambda r: slow(r, np.linspace(0.95, 0.99, 20)))
    yield linear("symmetric, ρ .95", samples, symmetric)


def random_cells(samples: int, seed: int = 0) -> Iterator[Case]:
    """Yield cells with random weights."""
    for gain in (1.0, 2.0):
        yield tanh_cell(gain, samples, seed)
    yield module("conv cell, random weights", ConvCell(8), (samples, 8, 6, 6), seed)
    yield module("attention cell, random weights", AttentionCell(8, 24), (samples, 8, 24), seed)


SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
NARROW = 64


def small_tanh_cells(samples: int, seed: int = 0) -> Iterator[Case]:
    """Yield random tanh cells of two widths and four gains; those of width 64 have cotangents of three numbers only."""
    for width in (32, 100):
        for gain in (0.7, 1.0, 1.3, 1.6):
            yield tanh_cell(gain, samples, 500 + seed, width)
    for gain in (1.0, 1.5):
        yield tanh_cell(gain, samples, 800 + seed, NARROW, cotangents=3)


def dense_slow_modes(samples: int, seed: int = 0) -> Iterator[Case]:
    """Yield one to five slow modes up to .999, of which random cotangents show more or less."""
    for modes in ([0.99], [0.999], [0.97, 0.99], [0.95, 0.97, 0.98, 0.99, 0.995]):
        for width, radius in ((32, 0.3), (100, 0.3), (100, 0.6)):
            name = f"slow {', '.join(f'{m:g}'[1:] for m in modes)}; others ±{radius}, n {width}"

            def make(r: np.random.Generator, modes: list[float] = modes, n: int = width, radius: float = radius) -> Any:
                return slow(r, modes, n, radius)

            yield _linear(name, samples, make, 2000 + seed, width)


def hidden_modes(samples: int, seed: int = 0) -> Iterator[Case]:
    """Yield a diagonal J with one mode of .999 that x does not excite; the cotangent has little of it, or a fifth."""
    for spread in (0.0, 0.3):
        for share in SHARES:
            yield hidden_mode(share, spread, samples, seed)


def hidden_mode(share: float, spread: float, samples: int, seed: int = 0) -> Case:
    """J = diag(.3 ± spread, …, .999), x and g random except for the last entry: 0 in x, `share` of ‖g‖ in g."""
    rngs = [np.random.default_rng(3000 + seed + i) for i in range(samples)]
    diagonal = np.stack([0.3 + spread * rng.uniform(-1, 1, NARROW) for rng in rngs])
    x, g = (np.stack([rng.standard_normal(NARROW) for rng in rngs]) for _ in range(2))
    diagonal[:, -1], x[:, -1], g[:, -1] = 0.999, 0.0, 0.0
    g[:, -1] = share * np.linalg.norm(g, axis=1) / np.sqrt(1 - share**2)

    def f(diagonal: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: diagonal * z + x

    wide, shift, cotangent = torch.tensor(diagonal), torch.tensor(x), torch.tensor(g).float()
    name = f"hidden .999, share {100 * share:g} %, others .3" + (f" ± {spread:g}" if spread else "")
    return Case(name, RANDOM, f(wide.float(), shift.float()), f(wide, shift), 0 * shift.float(), cotangent)


def _linear(name: str, samples: int, make: Callable[[np.random.Generator], np.ndarray], seed: int, n: int = N) -> Case:
    """f(z) = J z + b with one Jacobian per sample."""
    rngs = [np.random.default_rng(seed + i) for i in range(samples)]
    jacobian = torch.tensor(np.stack([make(rng) for rng in rngs]))
    b = torch.tensor(np.stack([rng.standard_normal(n) for rng in rngs]))
    g = torch.tensor(np.stack([rng.standard_normal(n) for rng in rngs]))

    def f(jacobian: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: torch.einsum("bij,bj->bi", jacobian, z) + b

    return Case(name, RANDOM, f(jacobian.float(), b.float()), f(jacobian, b), 0 * b.float(), g.float())


RANDOM = "random cotangents"
OWN = "own cotangents"


def non_normal(rng: np.random.Generator) -> np.ndarray:
    """Triangular with a heavy upper part: eigenvalues say little about its powers."""
    upper = np.triu(rng.standard_normal((N, N)), 1) * 1.2 / np.sqrt(N)
    return upper + np.diag(rng.uniform(-0.8, 0.8, N))


def slow(rng: np.random.Generator, modes: object, n: int = N, radius: float = 0.3) -> np.ndarray:
    """Draw a matrix with some eigenvalues near one, the others within ±radius, and eigenvectors not orthogonal."""
    vectors = np.eye(n) + 0.5 * rng.standard_normal((n, n)) / np.sqrt(n)
    values = rng.uniform(-radius, radius, n)
    values[: len(modes)] = modes  # type: ignore[arg-type]
    return vectors @ np.diag(values) @ np.linalg.inv(vectors)


def symmetric(rng: np.random.Generator) -> np.ndarray:
    """Return eigenvalues spread evenly over ±0.95."""
    vectors = np.linalg.qr(rng.standard_normal((N, N)))[0]
    return vectors @ np.diag(rng.uniform(-0.95, 0.95, N)) @ vectors.T


def tanh_cell(gain: float, samples: int, seed: int = 0, n: int = N, cotangents: int | None = None) -> Case:
    """tanh(W z + b) with random weights, no contraction at 0 for gain 2. Only the first `cotangents` of g are not 0."""
    rngs = [np.random.default_rng(seed + i) for i in range(samples)]
    w = torch.tensor(np.stack([rng.standard_normal((n, n)) * gain / np.sqrt(n) for rng in rngs]))
    b = torch.tensor(np.stack([rng.standard_normal(n) for rng in rngs]))
    g = torch.tensor(np.stack([rng.standard_normal(n) for rng in rngs]))
    g[:, n if cotangents is None else cotangents :] = 0.0

    def f(w: Tensor, b: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: torch.tanh(torch.einsum("bij,bj->bi", w, z) + b)

    width = "" if n == N else f", n {n}" + ("" if cotangents is None else f", {cotangents} cotangents")
    name = f"tanh cell, gain {gain:g}{width}"
    return Case(name, RANDOM, f(w.float(), b.float()), f(w, b), 0 * b.float(), g.float())


class ConvCell(nn.Module):
    """norm(relu(z + norm(x + conv(norm(relu(conv z)))))): the residual block of the implicit-layers tutorial."""

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(groups, channels) for _ in range(3))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y = self.norm1(torch.relu(self.conv1(z)))
        return self.norm3(torch.relu(z + self.norm2(x + self.conv2(y))))


class AttentionCell(nn.Module):
    """A transformer block with its input injected, norms after the sums as in DEQ-Transformer."""

    def __init__(self, tokens: int, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        batch, tokens, width = z.shape
        q, k, v = (self.qkv(z) + 0.0).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        mixed = (scores @ v).transpose(1, 2).reshape(batch, tokens, width)
        y = self.norm1(x + z + self.out(mixed))
        return self.norm2(y + self.mlp(y))


def module(name: str, cell: nn.Module, shape: tuple[int, ...], seed: int = 0) -> Case:
    """Return a cell with its default random weights, random inputs and cotangents."""
    generator = torch.Generator().manual_seed(7 + seed)
    for parameter in cell.parameters():
        if parameter.dim() > 1:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    x = torch.randn(shape, generator=generator)
    g = torch.randn(shape, generator=generator)
    return of_module(name, RANDOM, cell, x, g)


def of_module(name: str, kind: str, cell: nn.Module, x: Tensor, g: Tensor) -> Case:
    """Return a cell `(z, x)` on given inputs."""
    cell.requires_grad_(False)
    double, wide = copy.deepcopy(cell).double(), x.double()
    return Case(name, kind, lambda z: cell(z, x), lambda z: double(z, wide), torch.zeros_like(g), g)
