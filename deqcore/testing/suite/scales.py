"""Problems in other units: s f(z/s), s near the ends of a dtype's range. Every method must take the same steps.

The factors are powers of two, so that they change no digit of f, and each sample has one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from deqcore.testing.suite.fixtures import Kit
from deqcore.types import Array, Tree

EXPONENTS: Final = {"float64": 664, "float32": 83, "bfloat16": 83}  # 1e±200, 1e±25, 1e±25


def scales(batch: int, dtype: str) -> Any:
    """Return factors `(batch,)`, float64: in turn tiny and huge for this dtype.

    Example:
        >>> scales(3, "float32").round(28).tolist()
        [1.034e-25, 9.671406556917033e+24, 1.034e-25]
    """
    k = EXPONENTS[dtype]
    return np.where(np.arange(batch) % 2 == 0, 2.0**-k, 2.0**k)


def times(kit: Kit, tree: Tree, factors: Array) -> Tree:
    """Multiply the rows of every array of the tree by `factors` `(batch,)`.

    Example:
        >>> import numpy as np, deqcore
        >>> kit = Kit(deqcore.get_backend(backend="numpy"), "cpu")
        >>> times(kit, [np.ones((2, 2))], np.array([1.0, 4.0]))[0].tolist()
        [[1.0, 1.0], [4.0, 4.0]]
    """
    leaves, structure = kit.backend.flatten(tree)
    moved = [leaf * kit.backend.xp.reshape(factors, (-1, *(1,) * (leaf.ndim - 1))) for leaf in leaves]
    return kit.backend.unflatten(structure, moved)


def scaled(kit: Kit, f: Callable[..., Tree], s: Any, dtype: str) -> Callable[..., Tree]:
    """Return the function s f(z/s) of each sample, whose fixed points are those of f times s.

    Args:
        kit: the backend.
        f: `f(z, *args)` on trees with the batch first.
        s: factors `(batch,)`, NumPy.
        dtype: of the states.

    Example:
        >>> import numpy as np, deqcore
        >>> kit = Kit(deqcore.get_backend(backend="numpy"), "cpu")
        >>> f = scaled(kit, lambda z: np.cos(z), np.array([4.0]), "float64")
        >>> f(np.array([[4.0 * np.pi]])).tolist()
        [[-4.0]]
    """
    up, down = kit.array(s, dtype), kit.array(1.0 / s, dtype)
    return lambda z, *args: times(kit, f(times(kit, z, down), *args), up)
