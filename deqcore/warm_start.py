"""Starts of a solve: parts of an earlier state that begin again, the better of two states, and sample ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from deqcore import config as settings
from deqcore.abc.arrays import is_inexact
from deqcore.abc.backend import Backend
from deqcore.errors import ConfigError, InitialIterateError, described
from deqcore.solve.dispatch import pick_backend
from deqcore.solve.flatten import RavelSpec
from deqcore.types import Array, Tree


def backend_of(tree: Tree) -> Backend:
    """Return the backend of the arrays in a tree."""
    return pick_backend(settings.resolve(None, {})[0], tree, ())


def is_stored(backend: Backend, leaf: Any) -> bool:
    """Return whether a solver changes this leaf of a state; others are those of the initial iterate."""
    return backend.is_array(leaf) and is_inexact(backend.dtype_name(leaf))


def check_ids(owner: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Refuse sample ids that are not a vector of integers.

    Raises:
        ConfigError: they are not.
    """
    if "int" not in dtype or len(shape) != 1:
        raise ConfigError.bad_value(owner, "ids", f"{dtype} {shape}", "integers of the shape (batch,)")


def check_batch(owner: str, count: int, z0_shape: tuple[int, ...]) -> None:
    """Refuse a leaf of a state whose first axis is not that of the ids.

    Raises:
        ConfigError: it is not.
    """
    if z0_shape[:1] != (count,):
        raise ConfigError(
            f"{owner}: ids must have one id for each sample, the first axis of z0 (got {count} ids and a leaf of the "
            f"shape {z0_shape}). A state that is one system (forward.batch = false) has no sample ids; start it from "
            f"its own last value, z0=sol.z."
        )


def restart_changed(previous: Tree, z0: Tree, changed: Any) -> Tree:
    """Return an earlier state whose changed parts begin again at z0: a masked warm start.

    For states of which a part has changed since they were solved: tokens that a sampler has unmasked, blocks of a video
    frame, atoms that were exchanged. The equilibrium does not depend on the start; only the steps to it do.

    Args:
        previous: the earlier state, a tree like z0. It is detached.
        z0: the initial iterate for changed parts. Leaves of integers and booleans are those of z0.
        changed: where the state begins again: an array of bool whose shape is the beginning of the shape of each leaf,
            as `(batch,)`, `(batch, units)` or the whole shape; or a tree like z0 of such arrays.

    Returns:
        The start, a tree like z0.

    Raises:
        ConfigError: `changed` is not of bool, or does not fit a leaf.
        InitialIterateError: the trees have another structure or other shapes.

    Example:
        >>> import numpy as np
        >>> old, z0 = np.ones((1, 3, 2)), np.zeros((1, 3, 2))
        >>> restart_changed(old, z0, np.array([[False, True, False]]))[0, :, 0].tolist()
        [1.0, 0.0, 1.0]
    """
    backend = backend_of(z0)
    leaves, structure = backend.flatten(z0)
    old, old_structure = backend.flatten(previous)
    if old_structure != structure:
        raise InitialIterateError(
            f"restart_changed: the earlier state must be a tree like z0, of the structure {structure} (got "
            f"{described(previous)} of the structure {old_structure})."
        )
    masks, shape = backend.flatten(changed)
    if shape != structure or len(leaves) == 1:
        masks = [changed if len(masks) != 1 else masks[0]] * len(leaves)
    starts = [
        _restarted(backend, *parts) if is_stored(backend, parts[0]) else parts[0]
        for parts in zip(leaves, old, masks, strict=True)
    ]
    return backend.unflatten(structure, starts)


def _restarted(backend: Backend, z0: Array, old: Any, changed: Any) -> Array:
    if not backend.is_array(old) or tuple(old.shape) != tuple(z0.shape):
        raise InitialIterateError(
            f"restart_changed: a leaf of the earlier state must have the shape {tuple(z0.shape)} of z0 (got "
            f"{described(old)}). Start a state of another size at z0."
        )
    if not backend.is_array(changed):
        changed = np.asarray(changed)
    dtype, shape = str(changed.dtype), tuple(changed.shape)
    if "bool" not in dtype or not shape or shape != tuple(z0.shape[: len(shape)]):
        expected = f"bools whose shape is a beginning of the shape {tuple(z0.shape)}"
        raise ConfigError.bad_value("restart_changed", "changed", f"{dtype} {shape}", expected)
    mask = backend.asarray(changed, dtype="bool", like=z0)
    mask = backend.xp.reshape(mask, (*shape, *(1,) * (z0.ndim - len(shape))))
    moved = backend.asarray(backend.detach(old), like=z0)
    return backend.xp.where(mask, z0, moved)


def closer_start(f: Callable[..., Tree], z0: Tree, stored: Tree, *args: Any) -> Tree:
    """Return for each sample the start with the smaller residual ‖f(z) − z‖.

    It protects from stored states that no longer fit, such as those from before a large change of the parameters. It
    costs two evaluations of f. A start where f is not finite loses.

    Args:
        f: as in `fixed_point`.
        z0: one start, with the batch as the first axis of each leaf.
        stored: another one, a tree like z0. It wins a tie.
        *args: further arguments of f.

    Returns:
        The start, a tree like z0, detached.

    Raises:
        InitialIterateError: a start is unfit, or the two differ in structure, shape or dtype.
        ProblemError: f returned another structure, shape, dtype or device.

    Example:
        >>> import numpy as np
        >>> f = lambda z: 0.5 * z + 1.0  # the fixed point is 2
        >>> closer_start(f, np.zeros((2, 1)), np.array([[1.9], [50.0]])).tolist()
        [[1.9], [0.0]]
    """
    backend = backend_of(z0)
    space = RavelSpec.of(backend, z0, True)
    flat, starts = space.wrap(f), [space.ravel(z0), space.ravel_like("stored start", stored)]
    starts = [backend.detach(start) for start in starts]
    with backend.errstate():
        moves = [backend.norm(backend.detach(flat(start, *args)) - start) for start in starts]
    xp = backend.xp
    sizes = [xp.where(xp.isfinite(move), move, xp.full_like(move, float("inf"))) for move in moves]
    return space.unravel(backend.select(sizes[1] <= sizes[0], starts[1], starts[0]))
