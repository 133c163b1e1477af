"""Whether f keeps causality: no unit may read a later one, or a model that was trained so cannot generate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deqcore import config as settings
from deqcore.abc.arrays import is_inexact
from deqcore.abc.backend import Backend
from deqcore.errors import ConfigError, ProblemError
from deqcore.solve.dispatch import pick_backend
from deqcore.solve.flatten import RavelSpec
from deqcore.types import SolveResult, Tree

MOVE = 0.5  # by which states and inputs are moved, relative to 1 + |x|


@dataclass(frozen=True)
class CausalityLeak:
    """A unit of f that reads a later one.

    Attributes:
        position: the unit of f(z) that changes.
        source: the first later position whose change it follows.
        argument: what was changed there: "z", or the position of the argument among those after z.
        change: the largest change of a number of f(z) at `position`.

    Example:
        >>> str(CausalityLeak(2, 3, "z", 0.25))
        'Position 2 of f(z) changes by up to 0.25 when position 3 of z does.'
    """

    position: int
    source: int
    argument: str | int
    change: float

    def __str__(self) -> str:
        """Return the leak in one sentence."""
        name = self.argument if self.argument == "z" else f"argument {self.argument}"
        return (
            f"Position {self.position} of f(z) changes by up to {self.change:.2g} when position {self.source} of "
            f"{name} does."
        )


def check_causality(
    f: Callable[..., Tree], z: Tree, *args: Any, unit_args: Sequence[int] = (), seed: int = 0
) -> CausalityLeak | None:
    """Look for a unit of f(z, *args) that depends on a later unit.

    For each position t all positions from t on are moved, and those before t must keep every bit. Only what f computes
    at this point is seen: a leak through a branch that the data does not take is not. Not for traced code.

    Cost: `units` evaluations of f for z, `units` for each of `unit_args`, and a few more to name the positions.

    Args:
        f: as in `fixed_point`.
        z: the point, a tree of arrays `(batch, units, ...)`, such as a solution.
        *args: further arguments of f.
        unit_args: positions in `args` whose arrays are `(batch, units, ...)`, too, and are moved in the same way.
        seed: of the moves.

    Returns:
        The leak with the earliest position, or None.

    Raises:
        InitialIterateError: a leaf of z has fewer than three axes, or the leaves differ in the first two.
        ProblemError: f returned something that is not like z, or gives other values for the same arguments.
        ConfigError: a position in `unit_args` does not exist, or an array there does not have the axes of units.

    Example:
        >>> import numpy as np
        >>> mean = lambda z: 0.5 * z + 0.1 * z.mean(axis=1, keepdims=True)  # over all tokens
        >>> print(check_causality(mean, np.ones((1, 4, 2))))  # doctest: +ELLIPSIS
        Position 0 of f(z) changes by up to ... when position 1 of z does.
        >>> check_causality(lambda z: 0.5 * np.cumsum(z, axis=1), np.ones((1, 4, 2))) is None
        True
    """
    backend = pick_backend(settings.resolve(None, {})[0], z, args)
    space = RavelSpec.of(backend, z, 2)
    units = space.rows_shape[1]
    _check_arguments(backend, space.rows_shape, args, unit_args)
    raveled = space.wrap(f)

    def value(z: Tree, *args: Any) -> Any:
        once = lambda f, z: SolveResult(f(z), None, None, None, None, None, None)  # noqa: E731
        with backend.errstate(), backend.guards.keep_random_state(space.leaves(z)[0]):
            fz = backend.autodiff.forward_only(raveled, backend.detach(space.ravel(z)), args, once).z
        return backend.to_numpy(backend.detach(fz)).reshape(*space.rows_shape, -1)

    everything = (z, *args)
    base = value(*everything)
    if not np.array_equal(base, value(*everything), equal_nan=True):
        raise ProblemError(
            "f gave other values for the same arguments, so its causality cannot be checked. Switch dropout and noise "
            "off (eval()), or draw them once and pass them as an argument."
        )

    def changed(place: int, positions: Any, before: int) -> Any:
        """Return the change of each position below `before` when `positions` of one argument move."""
        moved = list(everything)
        moved[place] = _moved(backend, everything[place], positions, units, seed)
        new = value(*moved)
        gap = np.abs(new - base).max(axis=(0, 2), initial=0.0)[:before]
        same = (new == base) | (np.isnan(new) & np.isnan(base))
        return np.where(same.all(axis=(0, 2))[:before], 0.0, np.where(gap > 0, gap, np.inf))

    leaks = []
    for place in (0, *(1 + i for i in unit_args)):
        for t in range(1, units):
            change = changed(place, np.arange(t, units), t)
            if change.any():
                position = int(np.flatnonzero(change)[0])
                single = ((j, changed(place, [j], t)[position]) for j in range(t, units))
                source, size = next(((j, size) for j, size in single if size), (t, change[position]))
                leaks.append(CausalityLeak(position, source, "z" if place == 0 else place - 1, float(size)))
                break
    return min(leaks, key=lambda leak: leak.position, default=None)


def _moved(backend: Backend, tree: Tree, positions: Any, units: int, seed: int) -> Tree:
    """Return the tree with its floating-point and complex arrays moved at these positions of the second axis."""
    rng, xp = np.random.default_rng(seed), backend.xp
    there = np.zeros(units)
    there[positions] = 1.0
    leaves, structure = backend.flatten(tree)

    def move(leaf: Any) -> Any:
        if not backend.is_array(leaf) or not is_inexact(backend.dtype_name(leaf)):
            return leaf
        signs = rng.choice([-MOVE, MOVE], tuple(leaf.shape)) * there.reshape(1, units, *[1] * (leaf.ndim - 2))
        leaf = backend.detach(leaf)
        return leaf + backend.asarray(signs, like=leaf) * (1 + xp.abs(leaf))

    return backend.unflatten(structure, [move(leaf) for leaf in leaves])


def _check_arguments(backend: Backend, shape: tuple[int, ...], args: tuple[Any, ...], unit_args: Sequence[int]) -> None:
    for i in unit_args:
        if not 0 <= i < len(args):
            raise ConfigError.bad_value(
                "check_causality", "unit_args", tuple(unit_args), f"positions among the {len(args)} arguments after z"
            )
        for leaf in backend.flatten(args[i])[0]:
            if backend.is_array(leaf) and tuple(leaf.shape[:2]) != shape:
                raise ConfigError(
                    f"check_causality: unit_args names argument {i}, so the first two axes of each array in it must be "
                    f"{shape}, those of z (got the shape {tuple(leaf.shape)}). Leave the argument out, or pass it in "
                    f"that shape."
                )
