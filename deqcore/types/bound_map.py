"""A function of the state whose other arguments stay visible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deqcore.types.arrays import Array


@dataclass(frozen=True)
class BoundMap:
    """The map z ↦ f(z, *args), which still shows its arguments.

    Attributes:
        f: `f(z, *args)` on `(batch, n)`.
        args: any trees.
    """

    f: Callable[..., Array]
    args: tuple[Any, ...]

    def __call__(self, z: Array) -> Array:
        """Evaluate f at z `(batch, n)`."""
        return self.f(z, *self.args)
