"""Is a layer causal: does each position depend on itself and earlier positions alone?"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from deqcore.abc.arrays import is_inexact
from deqcore.diagnostics.check.gradient import ExactAdjoint
from deqcore.diagnostics.check.independence import ROUNDING, distance_allowed
from deqcore.diagnostics.check.report import FAILED, NOTE, OK, SKIPPED, Finding
from deqcore.diagnostics.check.subject import Subject, mapped
from deqcore.diagnostics.linearization import host
from deqcore.errors import ConfigError
from deqcore.types import Array, Tree

POSITIONS: Final = 16  # that are moved at most
MOVE: Final = 0.1


def causal(subject: Subject, exact: ExactAdjoint) -> Finding:
    """Move one position of state and inputs at a time, and look at the positions before it.

    Raises:
        ConfigError: the state has no such axis.
    """
    axis = subject.record.claims.causal
    if axis is None:
        return Finding("causal", SKIPPED, "no causality is promised", "not measured")
    shapes = subject.space.shapes
    if any(len(shape) <= axis for shape in shapes) or len({shape[axis] for shape in shapes}) != 1:
        raise ConfigError.bad_value("Claims", "causal", axis, f"an axis of the state, whose shapes are {list(shapes)}")
    length = shapes[0][axis]
    expected = "no position depends on a later one"
    moved = [int(p) for p in np.unique(np.linspace(1, length - 1, min(POSITIONS, length - 1)).round())]
    in_cell = _leak(subject, axis, moved, lambda p: _cell_moved(subject, axis, p), subject.f(subject.z))
    if in_cell is not None:
        reader, read, size = in_cell
        remedy = "Mask the cell: attention, convolution and normalisation must see no later position."
        found = f"in the cell, position {reader} reads position {read} (a relative change of {size:.2g})"
        return Finding("causal", FAILED, expected, found, remedy, {"reader": reader, "read": read, "change": size})
    in_layer = _leak(subject, axis, moved, lambda p: subject.run(inputs=_inputs(subject, axis, length, p)), subject.z)
    if in_layer is None:
        return Finding("causal", OK, expected, f"none of {len(moved)} positions changes an earlier one")
    reader, read, size = in_layer
    inputs = _inputs(subject, axis, length, read)
    other = subject.backend.detach(subject.run(inputs=inputs))
    before = _before(subject, axis, read)
    gap = np.linalg.norm((host(subject.backend, other) - host(subject.backend, subject.z)) * before, axis=1)
    within = bool(np.all(gap <= distance_allowed(subject, exact, other, inputs=inputs)))
    found = f"the cell is causal; in the layer, position {reader} changes with position {read} by {size:.2g} (relative)"
    remedy = (
        "The solver shares coefficients or a stopping rule between positions. Solve each position as a sample of its "
        "own, or use a smaller tolerance."
    )
    figures = {"reader": reader, "read": read, "change": size}
    return Finding("causal", NOTE if within else FAILED, expected, found, remedy, figures)


def _leak(subject: Subject, axis: int, moved: list[int], run: Any, base: Array) -> tuple[int, int, float] | None:
    """Return (reader, read, relative change) of the largest change at a position before the moved one."""
    backend = subject.backend
    here = host(backend, base)
    scale = float(np.max(np.abs(here), initial=0.0)) or 1.0
    allowed = ROUNDING * backend.eps(subject.z)
    for p in moved:
        change = np.abs(host(backend, run(p)) - here) / scale * _before(subject, axis, p)
        if not np.max(change, initial=0.0) <= allowed:
            places = _positions(subject, axis)
            size = float(np.nanmax(change))
            return int(places[np.unravel_index(np.nanargmax(change), change.shape)]), p, size
    return None


def _positions(subject: Subject, axis: int) -> Any:
    """Return the position of each number of the state, as a matrix like it."""
    parts = []
    for shape in subject.space.shapes:
        index = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        parts.append(np.broadcast_to(index, shape).reshape(subject.z.shape[0], -1))
    return np.concatenate(parts, axis=1)


def _before(subject: Subject, axis: int, p: int) -> Any:
    return (_positions(subject, axis) < p).astype(float)


def _cell_moved(subject: Subject, axis: int, p: int) -> Array:
    """Return the cell with position p of its state and of its inputs moved."""
    length = subject.space.shapes[0][axis]
    backend, z = subject.backend, subject.z
    here = (_positions(subject, axis) == p).astype(float)
    shift = backend.cast(backend.asarray(MOVE * here * (1 + np.abs(host(backend, z))), like=z), z)
    return backend.detach(subject.f(z + shift, inputs=_inputs(subject, axis, length, p)))


def _inputs(subject: Subject, axis: int, length: int, p: int) -> tuple[Tree, ...]:
    """Return the inputs with position p moved: floating-point numbers by a tenth, others to those of position p − 1."""
    backend = subject.backend

    def change(leaf: Array) -> Array:
        if leaf.ndim <= axis or leaf.shape[axis] != length:
            return leaf
        values = np.array(backend.to_numpy(backend.detach(leaf)))
        at: list[Any] = [slice(None)] * leaf.ndim
        at[axis] = p
        before = list(at)
        before[axis] = p - 1
        index = tuple(at)
        floating = is_inexact(backend.dtype_name(leaf))
        values[index] = values[index] + MOVE * (1 + np.abs(values[index])) if floating else values[tuple(before)]
        return backend.cast(backend.asarray(values, like=leaf), leaf)

    return tuple(mapped(backend, tree, change) for tree in subject.inputs)
