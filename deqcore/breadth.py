"""Breadth at evaluation: several starts of a loop, of which each sample keeps the one that came to rest best."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from deqcore.errors import ConfigError, StrategyError
from deqcore.solution import Solution
from deqcore.types import Array, Tree


class Best(NamedTuple):
    """The choice of `best_of`.

    Attributes:
        value: for each sample the value with the smallest residual, a tree like a start.
        residual: its residual `(batch,)`.
        index: which start it came from, `(batch,)` int32.

    Example:
        >>> import numpy as np, deqcore
        >>> best_of(lambda z0: deqcore.fixed_point(np.cos, z0), [np.zeros((1, 2))]).index.tolist()
        [0]
    """

    value: Tree
    residual: Array
    index: Array


def best_of(solve: Callable[[Tree], Solution], starts: Iterable[Tree]) -> Best:
    """Solve from several starts and keep, for each sample, the value with the smallest residual.

    A trained loop may have several attractors; the one that holds the answer is usually the one in which it comes to
    rest. Starts that end with a residual of NaN or inf are never chosen, unless all do.

    Args:
        solve: from a start to its solution, such as `lambda z0: layer.solve(x, z0=z0)`. It must report a residual:
            the strategy `looped` does with `measure = true`.
        starts: trees like z0, at least one.

    Returns:
        The choice. Gradients flow through what was chosen.

    Raises:
        ConfigError: there are no starts.
        StrategyError: the strategy measures no residual.

    Example:
        >>> import numpy as np, deqcore
        >>> f = lambda z: z - 0.1 * (z**2 - 1) * z * (z - 3)  # fixed points -1, 0, 1 and 3
        >>> solve = lambda z0: deqcore.fixed_point(f, z0, forward__max_steps=12, forward__on_failure="ignore")
        >>> best = best_of(solve, [np.full((2, 1), 5.0), np.array([[1.1], [np.nan]])])
        >>> best.index.tolist()
        [1, 0]
    """
    best: Best | None = None
    for number, start in enumerate(starts):
        solution = solve(start)
        backend, xp = solution.backend, solution.backend.xp
        residual = solution.residual
        if not backend.is_traced(residual) and backend.known_all(xp.isnan(residual)) and best is None:
            _refuse_unmeasured(solution)
        residual = xp.where(xp.isfinite(residual), residual, xp.full_like(residual, float("inf")))
        index = xp.zeros_like(solution.steps) + number
        if best is None:
            best = Best(solution.value, residual, index)
            continue
        better = residual < best.residual
        leaves, structure = backend.flatten(solution.value)
        earlier, _ = backend.flatten(best.value)
        mask = better if better.shape[0] > 1 else better[0]
        chosen = [
            xp.where(xp.reshape(mask, (*mask.shape, *[1] * (new.ndim - mask.ndim))), new, old)
            for new, old in zip(leaves, earlier, strict=True)
        ]
        best = Best(
            backend.unflatten(structure, chosen),
            xp.where(better, residual, best.residual),
            xp.where(better, index, best.index),
        )
    if best is None:
        raise ConfigError.bad_value("best_of", "starts", [], "at least one start")
    return best


def _refuse_unmeasured(solution: Solution) -> None:
    if solution.fz is None:
        raise StrategyError(
            "best_of chooses by the residual, which this strategy does not measure (got NaN). Set measure = true in "
            "backward.options of 'looped', or evaluate with a strategy that solves."
        )
