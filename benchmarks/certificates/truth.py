"""The truth about a case, in float64 and dense: nothing here comes from deqcore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.certificates.problems import Case


@dataclass(frozen=True)
class Truth:
    """Dense facts of a batch.

    Attributes:
        a: I − Jᵀ per sample `(batch, n, n)`.
        g: cotangents `(batch, n)`.
        u: a^-1 g.
        condition: ‖a‖‖a^-1‖ `(batch,)`.
    """

    a: Any
    g: Any
    u: Any
    condition: Any

    def residual(self, u: Any) -> Any:
        """‖g − a u‖ / ‖g‖ `(batch,)`."""
        return np.linalg.norm(self.g - np.einsum("bij,bj->bi", self.a, u), axis=1) / np.linalg.norm(self.g, axis=1)

    def error(self, u: Any) -> Any:
        """‖u − a^-1 g‖ / ‖a^-1 g‖ `(batch,)`."""
        return np.linalg.norm(u - self.u, axis=1) / np.linalg.norm(self.u, axis=1)

    def cosine(self, u: Any) -> Any:
        """Return the cosine of the angle between u and a^-1 g, `(batch,)`."""
        return np.sum(u * self.u, axis=1) / np.linalg.norm(u, axis=1) / np.linalg.norm(self.u, axis=1)


def truth(case: Case, z: Tensor) -> Truth:
    """Return the rows of J one by one, by automatic differentiation of the float64 function, then LAPACK."""
    shape = case.z0.shape
    at = z.double().reshape(shape).requires_grad_()
    value = case.wide(at)
    n = value[0].numel()
    rows = []
    for i in range(n):
        unit = torch.zeros(shape[0], n, dtype=torch.float64)
        unit[:, i] = 1.0
        (row,) = torch.autograd.grad(value, at, unit.reshape(shape), retain_graph=True)
        rows.append(row.reshape(shape[0], n).numpy())
    jacobian = np.stack(rows, axis=1)
    a = np.eye(n) - np.swapaxes(jacobian, 1, 2)
    g = case.g.double().reshape(shape[0], n).numpy()
    return Truth(a, g, np.linalg.solve(a, g[:, :, None])[:, :, 0], np.linalg.cond(a))


def gmres_residuals(a: Any, g: Any, steps: int) -> Any:
    """‖g − a u‖ / ‖g‖ of the best u in each Krylov space of 0 … steps dimensions, for one sample.

    Textbook: orthonormal bases of the space and of its image by Gram and Schmidt, twice.
    """
    left = g / np.linalg.norm(g)
    result, basis, images = [1.0], [left], []
    for _ in range(min(steps, len(g))):
        w = a @ basis[-1]
        image = _orthogonal(w, images)
        size = np.linalg.norm(image)
        if size <= 1e-14 * np.linalg.norm(w):
            break
        images.append(image / size)
        left = left - (images[-1] @ left) * images[-1]
        result.append(float(np.linalg.norm(left)))
        v = _orthogonal(w, basis)
        size = np.linalg.norm(v)
        if size <= 1e-14 * np.linalg.norm(w):
            break
        basis.append(v / size)
    return np.array(result)


def gmres_errors(a: Any, m: Any | None, g: Any, u: Any, steps: int = 60) -> Any:
    """‖u_k − u‖ / ‖u‖ of the least residual's u_k in the Krylov spaces of `a m` with 0 … steps dimensions."""
    product = a if m is None else a @ m
    vectors, images, result = [g / np.linalg.norm(g)], [], [1.0]
    for _ in range(min(steps, len(g))):
        images.append(product @ vectors[-1])
        y = np.linalg.lstsq(np.stack(images, 1), g, rcond=1e-13)[0]
        x = np.stack(vectors, 1) @ y
        result.append(float(np.linalg.norm((x if m is None else m @ x) - u) / np.linalg.norm(u)))
        v = _orthogonal(images[-1], vectors)
        size = np.linalg.norm(v)
        if size <= 1e-12 * np.linalg.norm(images[-1]):
            break
        vectors.append(v / size)
    return np.array(result)


def _orthogonal(w: Any, basis: list[Any]) -> Any:
    for _ in range(2):
        for v in basis:
            w = w - (v @ w) * v
    return w


def vjps_to(residuals: Any, goal: float) -> int:
    """Return the dimensions after which the residual is at most the goal; one more than there are if never."""
    met = np.flatnonzero(residuals <= goal)
    return int(met[0]) if met.size else len(residuals)
