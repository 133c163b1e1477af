"""Problems to measure on: written once with the array namespace, data from fixed seeds, float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from deqcore.testing.problem import Problem
from deqcore.types import Array, Tree


@dataclass(frozen=True)
class Case:
    """A problem and the accuracy to solve it to.

    Attributes:
        problem: the problem.
        note: what is special about it, one sentence.
        rtol: relative residual that each sample must reach.
        max_steps: step budget.
        uneven: whether some samples need many more steps than others, so that compaction should pay.
    """

    problem: Problem
    note: str
    rtol: float = 1e-5
    max_steps: int = 50
    uneven: bool = False

    @property
    def name(self) -> str:
        """The problem's name."""
        return self.problem.name


def cell(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """tanh(W z + x)."""
    return xp.tanh(xp.matmul(z, p["W"]) + x)


def linear(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """W z + x."""
    return xp.matmul(z, p["W"]) + x


def scaled(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """D (tanh(W D^-1 z) + x) with scales D over many orders of magnitude."""
    scale = p["scale"][None, :]
    return scale * (xp.tanh(xp.matmul(z / scale, p["W"])) + x)


def rated(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """ρ W z + b with an orthogonal W and a contraction rate ρ per sample."""
    return x["rate"] * xp.matmul(z, p["W"]) + x["b"]


def dense(batch: int = 256, size: int = 512, gain: float = 0.9) -> Case:
    """Return a tanh cell with a Gaussian matrix."""
    rng = np.random.default_rng(0)
    w = gain / size**0.5 * rng.standard_normal((size, size))
    return Case(
        _problem("dense", {"W": w}, rng.standard_normal((batch, size)), cell),
        f"tanh cell, {batch}×{size}, Gaussian matrix of spectral radius {gain}",
    )


def affine(batch: int = 64, size: int = 256) -> Case:
    """Return a symmetric matrix with eigenvalues spread evenly."""
    rng = np.random.default_rng(1)
    q = _orthogonal(rng, size)
    w = (q * np.linspace(-0.5, 0.9, size)) @ q.T
    return Case(
        _problem("affine", {"W": w}, rng.standard_normal((batch, size)), linear),
        f"affine, {batch}×{size}, symmetric, eigenvalues −0.5 … 0.9",
        max_steps=200,
    )


def slow_modes(batch: int = 16, size: int = 256, slow: int = 20) -> Case:
    """Return a few eigenvalues near 1, the others small."""
    rng = np.random.default_rng(2)
    slow = min(slow, size // 4)
    q = _orthogonal(rng, size)
    rest = 0.3 * rng.uniform(-1, 1, size - slow)
    w = (q * np.concatenate([np.linspace(0.95, 0.99, slow), rest])) @ q.T
    return Case(
        _problem("slow-modes", {"W": w}, rng.standard_normal((batch, size)), linear),
        f"affine, {batch}×{size}, symmetric, {slow} eigenvalues in 0.95 … 0.99, the others below 0.3",
        max_steps=200,
    )


def badly_scaled(batch: int = 64, size: int = 256) -> Case:
    """Return a tanh cell in coordinates whose units differ a million-fold."""
    rng = np.random.default_rng(3)
    w = 0.7 / size**0.5 * rng.standard_normal((size, size))
    params = {"W": w, "scale": np.logspace(-3, 3, size)}
    return Case(
        _problem("badly-scaled", params, rng.standard_normal((batch, size)), scaled),
        f"tanh cell, {batch}×{size}, units from 1e-3 to 1e3",
    )


def non_normal(batch: int = 64, size: int = 256) -> Case:
    """Return a triangular matrix: all eigenvalues 0.5, norm above 1, so the residual grows before it falls."""
    rng = np.random.default_rng(4)
    w = 0.5 * np.eye(size) + np.triu(1.2 / size**0.5 * rng.standard_normal((size, size)), 1)
    return Case(
        _problem("non-normal", {"W": w}, rng.standard_normal((batch, size)), linear),
        f"affine, {batch}×{size}, triangular, all eigenvalues 0.5, norm {np.linalg.norm(w, 2):.1f}",
        max_steps=200,
    )


def mixed(batch: int = 64, size: int = 512) -> Case:
    """Make a batch in which one sample needs ten times the steps of the others."""
    rng = np.random.default_rng(5)
    rate = np.full((batch, 1), 0.3)
    rate[batch // 2] = 0.3**0.1
    inputs = {"b": rng.standard_normal((batch, size)), "rate": rate}
    return Case(
        _problem("mixed", {"W": _orthogonal(rng, size)}, inputs, rated),
        f"affine, {batch}×{size}, orthogonal times 0.3, one sample of {batch} times 0.3^(1/10)",
        max_steps=200,
        uneven=True,
    )


def _orthogonal(rng: np.random.Generator, size: int) -> Array:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def _problem(name: str, params: dict[str, Array], inputs: Tree, f: Callable[..., Tree]) -> Problem:
    x = {key: narrow(value) for key, value in inputs.items()} if isinstance(inputs, dict) else narrow(inputs)
    like = x["b"] if isinstance(x, dict) else x
    return Problem(name, {key: narrow(value) for key, value in params.items()}, x, 0 * like, f)


def narrow(a: Array) -> Array:
    """Convert to float32."""
    return np.asarray(a, np.float32)


CASES: Final[Mapping[str, Callable[..., Case]]] = MappingProxyType(
    {
        "dense": dense,
        "affine": affine,
        "slow-modes": slow_modes,
        "badly-scaled": badly_scaled,
        "non-normal": non_normal,
        "mixed": mixed,
    }
)
"""Makers by name; all take `batch` and `size`."""

SMALL: Final[Mapping[str, int]] = MappingProxyType({"batch": 16, "size": 32})
"""Sizes of a first look."""
