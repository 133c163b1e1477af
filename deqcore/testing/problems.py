"""Golden problems: functions written once with the array namespace, and solutions that deqcore had no part in.

`golden(name)` gives a problem with its stored truth: z*, gradients of ⟨g, z*⟩ for a cotangent g, and the facts about
the Jacobian from which error bounds follow. `deqcore.testing.golden_values.make` computes and stores them.

All data are exact in float32, so that the same numbers are the truth in float64 and in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from deqcore.errors import ProblemError, did_you_mean, listing
from deqcore.testing.problem import Problem, rebuild, walk
from deqcore.testing.tolerances import Sensitivity, Slope
from deqcore.types import Array, Tree

FOLDER: Final = Path(__file__).parent / "golden_values"


def affine(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """W z + U x + b: the closed form is a linear solve."""
    return xp.matmul(z, p["W"].T) + xp.matmul(x, p["U"].T) + p["b"][None, :]


def mlp(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """Return a two-layer cell, V tanh(W z + U x + b) + c."""
    hidden = xp.tanh(xp.matmul(z, p["W"].T) + xp.matmul(x, p["U"].T) + p["b"][None, :])
    return xp.matmul(hidden, p["V"].T) + p["c"][None, :]


def conv(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """tanh(K ∗ z + x + b) with a 3×3 convolution and zero padding on `(batch, channel, height, width)`."""
    _, _, height, width = z.shape
    wide = xp.concat([0 * z[..., :1], z, 0 * z[..., :1]], axis=3)
    tall = xp.concat([0 * wide[:, :, :1], wide, 0 * wide[:, :, :1]], axis=2)
    total = x + p["b"][None, :, None, None]
    for i in range(3):
        for j in range(3):
            moved = tall[:, :, i : i + height, j : j + width]  # (batch, in, height, width)
            kernel = p["K"][None, :, :, i, j, None, None]  # (1, out, in, 1, 1)
            total = total + xp.sum(kernel * moved[:, None], axis=2)
    return xp.tanh(total)


def ring(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """tanh(Σ_k c_k z_{i−k} + x) + b: few parameters and operations, a spectrum that takes many steps."""
    c = p["c"]
    near = c[0] * xp.roll(z, 1, axis=1) + c[1] * xp.roll(z, -1, axis=1)
    return xp.tanh(near + c[2] * xp.roll(z, 5, axis=1) + x) + p["b"]


def tree(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """Return two coupled feature maps of different shapes, as a dict with a list in it."""
    fine, coarse = z["maps"]
    pooled = xp.mean(fine, axis=2)  # (batch, 3)
    slow = xp.tanh(xp.matmul(coarse, p["A"].T) + xp.matmul(pooled, p["B"].T) + x["drive"])
    fast = 0.5 * xp.sin(fine) + p["s"] * coarse[:, :, None] + x["field"] + 0.25 * z["mean"][:, :, None]
    return {"maps": [fast, slow], "mean": 0.5 * pooled + 0.25 * slow}


def monotone(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """tanh(W z + U x) with W = (1 − m) I − AᵀA + B − Bᵀ: one solution whatever A and B are, but no contraction."""
    a, b = p["A"], p["B"]
    w = b - b.T - xp.matmul(a.T, a)
    return xp.tanh((1.0 - p["m"]) * z + xp.matmul(z, w.T) + xp.matmul(x, p["U"].T))


def expansive(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """X − W z − sin(z)/2 with ‖J‖ > 1: plain iteration diverges, I − J is well conditioned."""
    return x - xp.matmul(z, p["W"].T) - 0.5 * xp.sin(z)


def overshoot(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """Z − tanh(W z − x): plain iteration converges, but full Newton steps from afar overshoot ever further."""
    return z - xp.tanh(xp.matmul(z, p["W"].T) - x)


def walled(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """Z + c (x − log W z), known where W z > 0 alone: z* = W⁻¹ eˣ, and a full step from z0 leaves for NaN."""
    return z + p["c"] * (x - xp.log(xp.matmul(z, p["W"].T)))


def valve(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """Return a tanh cell, but a sample with x₀ > 0 obeys z ← z + x₀ (1 + z²), which has no solution."""
    cell = xp.tanh(xp.matmul(z, p["W"].T) + xp.matmul(x, p["U"].T))
    gate = x[:, :1]
    return cell + gate * (1.0 + z - cell + z * z)


def root(xp: Any, p: Tree, z: Tree, x: Tree) -> Tree:
    """Return a tanh cell plus √x₀, NaN in a sample with x₀ < 0."""
    return xp.tanh(xp.matmul(z, p["W"].T) + xp.matmul(x, p["U"].T)) + 0.1 * xp.sqrt(x[:, :1])


FUNCTIONS: Final[Mapping[str, Callable[..., Tree]]] = MappingProxyType(
    {
        "affine": affine,
        "mlp": mlp,
        "conv": conv,
        "ring": ring,
        "tree": tree,
        "monotone": monotone,
        "expansive": expansive,
        "overshoot": overshoot,
        "walled": walled,
        "ill-conditioned": affine,
        "slow-modes": affine,
        "divergent": valve,
        "nan": root,
    }
)


@dataclass(frozen=True)
class Truth:
    """What is known about a problem without deqcore.

    Attributes:
        z: z*, a tree like z0; NaN in samples that are not healthy.
        gradients: of ⟨g, z*⟩ by leaf name; `cotangent` is u = (I − J)^-T g itself, a tree's leaves raveled.
        jacobian: J at z* per sample, `(batch, n, n)`.
        healthy: samples that have a solution, `(batch,)` of bool.
        radius: spectral radius of J, the largest over the healthy samples.
        sensitivity: what error bounds follow from.
        bend: a direction in all data, by leaf name.
        hessian: how the gradients change along it (the Hessian of ⟨g, z*⟩ times `bend`), by leaf name; `cotangent`
            is the change of u.
        inverse: v, H v and Hᵀ v for the true H = (J − I)⁻¹, each `(batch, n)`.
    """

    z: Tree
    gradients: Mapping[str, Array]
    jacobian: Array
    healthy: Array
    radius: float
    sensitivity: Sensitivity
    bend: Mapping[str, Array]
    hessian: Mapping[str, Array]
    inverse: tuple[Array, Array, Array]

    @property
    def contracts(self) -> bool:
        """Whether plain iteration converges."""
        return self.radius < 1.0

    @property
    def all_healthy(self) -> bool:
        """Whether every sample has a solution, so that gradients of parameters make sense."""
        return bool(self.healthy.all())


@dataclass(frozen=True)
class Golden:
    """A problem and its truth."""

    problem: Problem
    truth: Truth


@cache
def golden(name: str) -> Golden:
    """Return one of the golden problems.

    Raises:
        ProblemError: there is none of this name.

    Example:
        >>> golden("mlp").problem.name
        'mlp'
    """
    if name not in FUNCTIONS:
        available = list(FUNCTIONS)
        raise ProblemError(
            f"No golden problem {name!r}.{did_you_mean(name, available)} There are: {listing(available)}."
        )
    with np.load(FOLDER / f"{name}.npz") as stored:
        data = {key: stored[key] for key in stored.files}
    problem = Problem(
        name=name,
        params={key: data[f"params[{key!r}]"] for key in _keys(data, "params")},
        inputs=_tree(data, "inputs"),
        z0=_tree(data, "z0"),
        f=FUNCTIONS[name],
        cotangent=_tree(data, "direction"),
    )
    slopes = {
        key: Slope(*(float(number) for number in data[f"slope:{key}"]))
        for key in [*(name for name, _ in problem.leaves()), "cotangent"]
    }
    inverse, jacobian, condition, state, cotangent, adjoint = (float(number) for number in data["sensitivity"])
    sensitivity = Sensitivity(inverse, jacobian, condition, state, cotangent, adjoint, slopes)
    truth = Truth(
        z=_tree(data, "solution"),
        gradients={key: data[f"gradient:{key}"] for key in slopes},
        jacobian=data["jacobian"],
        healthy=data["healthy"],
        radius=float(data["radius"]),
        sensitivity=sensitivity,
        bend={key: data[f"bend:{key}"] for key, _ in problem.leaves()},
        hessian={key: data[f"hessian:{key}"] for key in slopes},
        inverse=(data["probe"], data["inverse"], data["transposed"]),
    )
    return Golden(problem, truth)


def names() -> tuple[str, ...]:
    """Return the names of all golden problems."""
    return tuple(FUNCTIONS)


def _keys(data: Mapping[str, Array], prefix: str) -> list[str]:
    return [key[len(prefix) + 2 : -2] for key in data if key.startswith(f"{prefix}['")]


def _tree(data: Mapping[str, Array], name: str) -> Tree:
    """Return the tree whose leaves were stored under their names."""
    if name in data:
        return data[name]
    if f"{name}[0]" in data or any(key.startswith(f"{name}[0]") for key in data):
        length = 1 + max(int(key[len(name) + 1 :].partition("]")[0]) for key in data if key.startswith(f"{name}["))
        return [_tree(data, f"{name}[{i}]") for i in range(length)]
    result = sorted({key[len(name) + 2 :].partition("'")[0] for key in data if key.startswith(f"{name}['")})
    return {key: _tree(data, f"{name}[{key!r}]") for key in result}


def raveled(tree: Tree, batch: int) -> Array:
    """Return a NumPy tree as the matrix `(batch, n)` that the core sees."""
    return np.concatenate([np.reshape(leaf, (batch, -1)) for _, leaf in walk(tree, "")], axis=1)


def unraveled(matrix: Array, like: Tree) -> Tree:
    """Return the tree like `like` whose raveled form is `matrix` `(batch, n)`."""
    sizes = [leaf[0].size for _, leaf in walk(like, "")]
    parts = iter(np.split(matrix, np.cumsum(sizes)[:-1], axis=1))
    return rebuild(like, lambda leaf: np.reshape(next(parts), leaf.shape))
