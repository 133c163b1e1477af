"""A mask of units that take part: the others, such as padded tokens, stay where they start.

f with a mask reads and returns the start for every other unit, so that such a unit is at a fixed point from the first
evaluation on: no solver moves it, no gradient passes it, and its residual and steps are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from deqcore.abc.arrays import is_inexact
from deqcore.abc.backend import Backend
from deqcore.errors import ConfigError
from deqcore.solve.flatten import RavelSpec
from deqcore.types import Array, Tree


def checked(space: RavelSpec, mask: Any) -> Array:
    """Return the mask as an array of bool of the backend, in the shape of the units.

    Raises:
        ConfigError: it has another shape, or the whole state is one system.
    """
    backend, shape = space.backend, space.rows_shape
    given = tuple(np.shape(mask)) if not backend.is_array(mask) else tuple(mask.shape)
    if space.axes == 0 or given != shape:
        expected = f"an array of the shape {shape}, True where a unit takes part"
        if space.axes == 0:
            expected = "None with forward.batch = false, because the whole state is one system"
        raise ConfigError(
            f"mask must be {expected} (got the shape {given}). Set forward.batch = true for a mask of samples, or "
            f"forward.batch = 2 for a mask of the units of each sample."
        )
    return (mask if backend.is_array(mask) else backend.asarray(np.asarray(mask, bool))) != 0


def masked(backend: Backend, f: Callable[..., Tree], z0: Tree, mask: Array) -> Callable[..., Tree]:
    """Return f with z0, as constants, for what it reads and returns in each unit outside of `mask`."""
    start, structure = backend.flatten(z0)

    def hold(tree: Tree) -> Tree:
        leaves, new_structure = backend.flatten(tree)
        if new_structure != structure:
            return tree  # the caller of f raises the error
        return backend.unflatten(structure, [_held(backend, mask, *pair) for pair in zip(leaves, start, strict=True)])

    def held(z: Tree, *args: Any) -> Tree:
        return hold(f(hold(z), *args))

    held.__wrapped__ = f  # type: ignore[attr-defined] # backward passes are counted for f
    return held


def _held(backend: Backend, mask: Array, fz: Any, start: Any) -> Any:
    fits = backend.is_array(fz) and getattr(start, "shape", None) == fz.shape
    if not fits or not is_inexact(backend.dtype_name(fz)):
        return fz  # carried along, or refused by the caller of f
    shape = (*mask.shape, *(1,) * (fz.ndim - mask.ndim))
    return backend.xp.where(backend.xp.reshape(mask, shape), fz, backend.cast(backend.detach(start), fz))
