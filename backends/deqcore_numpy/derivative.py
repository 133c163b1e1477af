"""Derivatives of plain NumPy functions: the complex step where it is valid, central differences elsewhere.

The complex step has no subtraction and so no rounding error, but its result is wrong if f is not analytic code (`abs`,
comparisons, casts to real). `differences.Differences.check` therefore compares both along a random direction first; an
unreliable difference does not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deqcore_numpy.differences import Differences, Function

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
    """Return whether f is being evaluated inside `differencing`."""
    return _differencing.get()


def jacobian(f: Function, x: NDArray[Any], *, state: bool = False) -> NDArray[Any]:
    """Return the dense Jacobian of f at x: `(f(x).size, x.size)`, float64, from x.size directional derivatives.

    Args:
        f: any function of one array.
        x: of a floating-point dtype, any shape.
        state: whether f's output has the unit of x, sample by sample.

    Warns:
        DerivativeWarning: f has a kink at x, or its derivative cannot be found with certainty.
    """
    x = np.asarray(x, np.float64)
    with differencing():
        rule = Differences(f, x, state=state).check()
        columns = [np.ravel(rule(unit)) for unit in _units(x)]
        rule.close()
    return np.stack(columns, axis=1) if columns else np.zeros((rule.at.base.size, 0))


def batched_jacobian(f: Function, z: NDArray[Any]) -> NDArray[Any]:
    """Return the Jacobian of each row of f with respect to its own row of z `(batch, n)`: `(batch, n, n)`, float64.

    Costs n directional derivatives, all rows at once, each row with its own steps.

    Warns:
        DerivativeWarning: f has a kink at z, or its derivative cannot be found with certainty.
    """
    z = np.asarray(z, np.float64)
    columns = []
    with differencing():
        rule = Differences(f, z, rows=True, state=True).check()
        for i in range(z.shape[1]):
            dz = np.zeros_like(z)
            dz[:, i] = 1.0
            columns.append(rule(dz))
        rule.close()
    return np.stack(columns, axis=2) if columns else np.zeros((*z.shape, 0))


def product(f: Function, z: NDArray[Any], rows: Callable[[], bool]) -> Function:
    """Return `v ↦ J v` for J = f'(z), both `(batch, n)`, float64.

    Without the complex step, coupled samples cost one directional derivative each, because one step cannot fit all.

    Warns:
        DerivativeWarning: f has a kink at z, or its derivative cannot be found with certainty.
    """
    z = np.asarray(z, np.float64)
    with differencing():
        independent = rows()
        rule = Differences(f, z, rows=independent, state=True).check()

    def multiply(v: NDArray[Any]) -> NDArray[Any]:
        v = np.asarray(v, np.float64)
        with differencing():
            parts = [v] if rule.analytic or independent else list(_samples(v))
            total = sum((rule(part) for part in parts), start=np.zeros(z.shape))
            rule.close()
        return total

    return multiply


def _units(x: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    for i in range(x.size):
        unit = np.zeros(x.size)
        unit[i] = 1.0
        yield unit.reshape(x.shape)


def _samples(v: NDArray[Any]) -> Iterator[NDArray[np.float64]]:
    for i in np.flatnonzero(v.any(axis=1)):
        part = np.zeros_like(v)
        part[i] = v[i]
        yield part


def vjp_back(dense: NDArray[Any], cotangent: NDArray[Any], value: NDArray[Any], leaf: NDArray[Any]) -> NDArray[Any]:
    """Return Σ_o cotangent_o ∂value_o/∂leaf; samples that are not finite do not enter the gradients of the others.

    A difference of NaN is NaN, even if the number does not depend on the leaf. If the leaf has the batch as its first
    axis, and no finite sample depends on another sample's part of it, then a sample that is not finite is assumed to
    depend only on its own part, too.

    Args:
        dense: `(value.size, leaf.size)`.
        cotangent: like `value`.
        value: f's output, `(batch, n)`; of any shape with the batch first.
        leaf: the array that was moved.
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
    # An entry that does not depend on a number gets nothing from it, not even 0 · NaN.
    parts = np.where(dense == 0.0, 0.0, np.ravel(cotangent)[:, None] * dense)
    gradient: NDArray[Any] = np.sum(parts, axis=0).reshape(leaf.shape)
    return gradient
