"""Derivatives of plain NumPy functions: complex step where it is valid, central differences elsewhere.

The complex step has no subtraction and so no rounding error, but it is wrong without a word where f is not analytic
code (`abs`, comparisons, casts to real). It is therefore tried against central differences along one random
direction first.

Source: Squire & Trapp (1998), "Using complex variables to estimate derivatives of real functions".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

TINY = 1e-100

_differencing: ContextVar[bool] = ContextVar("deqcore_numpy.differencing", default=False)


@contextmanager
def differencing() -> Iterator[None]:
    """Mark that f is evaluated in float64 or complex128 to differentiate it, whatever the state's dtype is."""
    token = _differencing.set(True)
    try:
        with np.errstate(all="ignore"):  # NaN and inf are statuses here, not warnings
            yield
    finally:
        _differencing.reset(token)


def is_differencing() -> bool:
    """Whether f is being evaluated inside `differencing`."""
    return _differencing.get()


def complex_step(f: Callable[[Any], Any], x: Any, dx: Any) -> Any:
    """f'(x)·dx for analytic f, exact to rounding; `x` and `dx` are float64."""
    return np.imag(f(x + 1j * TINY * dx)) / TINY


def central_difference(f: Callable[[Any], Any], x: Any, dx: Any) -> Any:
    """f'(x)·dx by a fourth-order central difference; error about 1e-11 relative to f."""
    finite = np.isfinite(x) & np.isfinite(dx)  # a sample that has failed must not choose the others' step
    size = np.linalg.norm(dx[finite])
    if size == 0:
        return np.zeros_like(f(x))
    h = 1e-3 * max(1.0, float(np.max(np.abs(x[finite]), initial=0.0))) / size
    near = f(x + h * dx) - f(x - h * dx)
    far = f(x + 2 * h * dx) - f(x - 2 * h * dx)
    return (8 * near - far) / (12 * h)


def pick(f: Callable[[Any], Any], x: Any) -> Callable[[Callable[[Any], Any], Any, Any], Any]:
    """The better rule for f at x: complex step if it agrees with differences along a random direction."""
    dx = np.random.default_rng(0).standard_normal(x.shape)
    if not x.size:
        return central_difference
    expected = central_difference(f, x, dx)
    if not np.size(expected):  # an empty batch shows nothing of what complex numbers meet in f
        return central_difference
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = complex_step(f, x, dx)
    except (TypeError, ValueError, NotImplementedError):
        return central_difference
    finite = np.isfinite(expected) & np.isfinite(found)
    same = np.linalg.norm((found - expected)[finite]) <= 1e-5 * np.linalg.norm(expected[finite]) + 1e-12
    return complex_step if same else central_difference


def jacobian(f: Callable[[Any], Any], x: Any) -> Any:
    """Dense Jacobian of f at x: `(f(x).size, x.size)`, float64, from x.size directional derivatives."""
    x = np.asarray(x, np.float64)
    with differencing():
        rule = pick(f, x)
        columns = []
        for i in range(x.size):
            dx = np.zeros(x.size)
            dx[i] = 1.0
            columns.append(np.ravel(rule(f, x, dx.reshape(x.shape))))
        return np.stack(columns, axis=1) if columns else np.zeros((np.size(f(x)), 0))


def batched_jacobian(f: Callable[[Any], Any], z: Any) -> Any:
    """Jacobians of each row of f with respect to its own row of z `(batch, n)`: `(batch, n, n)`, float64.

    Costs n directional derivatives, all rows at once.
    """
    z = np.asarray(z, np.float64)
    columns = []
    with differencing():
        rule = pick(f, z)
        for i in range(z.shape[1]):
            dz = np.zeros_like(z)
            dz[:, i] = 1.0
            columns.append(rule(f, z, dz))
    return np.stack(columns, axis=2) if columns else np.zeros((*z.shape, 0))


def pull_back(dense: Any, cotangent: Any, value: Any, leaf: Any) -> Any:
    """Σ_o cotangent_o ∂value_o/∂leaf, with samples that are not finite kept out of the gradients of the others.

    A difference of NaN is NaN whether or not the number depends on what was moved. Where the leaf has the batch as
    its first axis, and no finite sample depends on another one's part of it, an ill sample is taken to depend on its
    own part only, too.

    Args:
        dense: `(value.size, leaf.size)`.
        cotangent: like `value`.
        value: f's output, `(batch, n)`; of any shape with the batch first.
        leaf: what was moved.
    """
    if not np.size(value):
        return np.zeros(leaf.shape)
    value = np.reshape(value, (len(value), -1) if np.ndim(value) else (1, 1))
    ill = ~np.isfinite(value).all(axis=1)
    batch = len(value)
    if ill.any() and leaf.ndim and leaf.shape[0] == batch:
        blocks = dense.reshape(batch, value.shape[1], batch, -1).copy()
        apart = ~np.eye(batch, dtype=bool)
        well = ~ill[:, None] & ~ill[None, :] & apart
        if not blocks.transpose(0, 2, 1, 3)[well].any():
            blocks.transpose(0, 2, 1, 3)[ill[:, None] & apart] = 0.0
        dense = blocks.reshape(dense.shape)
    # What does not depend on a number gets nothing of it, not even 0 · NaN.
    return np.sum(np.where(dense == 0.0, 0.0, np.ravel(cotangent)[:, None] * dense), axis=0).reshape(leaf.shape)
