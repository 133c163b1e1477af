"""Compare what two computations of one problem found, quantity by quantity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

ORDER: Final = ("f(z0)", "z", "cotangent", "params", "inputs")
WHOLE: Final = ("f(z0)", "z", "cotangent")  # judged as one vector over all leaves, as the solver sees it


@dataclass(frozen=True)
class Comparison:
    """One quantity of one solve, against the truth or another framework.

    Attributes:
        problem: its name.
        backend: whose result is judged.
        against: "truth", or the backend that it is compared with.
        dtype: of the arithmetic.
        solver: of the forward solve.
        strategy: of the backward pass.
        quantity: "f(z0)", "z", "cotangent" (u = (I − J)^-T g), or a leaf such as "params['W']".
        error: 2-norm of the difference.
        relative: error divided by the norm of what it is compared with.
        cosine: between the two.
        bound: the largest error that tolerance, dtype and condition explain.
        place: where the difference is largest, with both values.
    """

    problem: str
    backend: str
    against: str
    dtype: str
    solver: str
    strategy: str
    quantity: str
    error: float
    relative: float
    cosine: float
    bound: float
    place: str

    @property
    def ok(self) -> bool:
        """Whether the difference is within its bound (NaN is not)."""
        return self.error <= self.bound

    @property
    def share(self) -> float:
        """Error as a part of the bound."""
        return self.error / self.bound if self.bound else (0.0 if self.error == 0 else float("inf"))


def quantity_of(name: str) -> str:
    """Return the quantity that an array belongs to."""
    return next((whole for whole in WHOLE if name.startswith(whole)), name)


def quantities(*results: Mapping[str, Any]) -> list[str]:
    """Return the quantities that all results have, in the order in which an error would travel."""
    common = set.intersection(*({quantity_of(name) for name in result} for result in results))

    def rank(name: str) -> tuple[int, str]:
        return next(i for i, start in enumerate(ORDER) if name.startswith(start)), name

    return sorted(common, key=rank)


def parts(result: Mapping[str, Any], quantity: str) -> dict[str, Any]:
    """Return the arrays of one quantity, by leaf name, in float64."""
    names = sorted(name for name in result if quantity_of(name) == quantity)
    return {name: np.asarray(result[name], np.float64) for name in names}


def vector(result: Mapping[str, Any], quantity: str) -> Any:
    """Return one quantity as one vector."""
    value = [np.ravel(part) for part in parts(result, quantity).values()]
    return np.concatenate(value) if value else np.zeros(0)


def size(result: Mapping[str, Any], quantity: str) -> float:
    """Return the 2-norm of a quantity."""
    return float(np.linalg.norm(vector(result, quantity)))


def differ(actual: Mapping[str, Any], expected: Mapping[str, Any], quantity: str) -> tuple[float, float, float, str]:
    """Return the error, relative error, cosine and the place of the largest difference of one quantity."""
    a, b = vector(actual, quantity), vector(expected, quantity)
    if a.shape != b.shape:
        shapes = [{name: part.shape for name, part in parts(item, quantity).items()} for item in (actual, expected)]
        return float("inf"), float("inf"), 0.0, f"shapes {shapes[0]} against {shapes[1]}"
    error, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    product = float(np.linalg.norm(a)) * norm
    cosine = float(a @ b) / product if product else 1.0
    relative = error / norm if norm else (0.0 if error == 0 else float("inf"))
    return error, relative, cosine, _place(parts(actual, quantity), parts(expected, quantity))


def _place(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    worst, text = -1.0, ""
    for name, part in actual.items():
        if not part.size or name not in expected:
            continue
        gap = np.abs(part - expected[name])
        gap = np.where(np.isnan(gap), np.inf, gap)
        if gap.max() > worst:
            worst = float(gap.max())
            index = np.unravel_index(int(np.argmax(gap)), gap.shape)
            at = f"[{', '.join(map(str, index))}]" if index else ""
            text = f"{name}{at}: {part[index]:.6g} against {expected[name][index]:.6g}"
    return text
