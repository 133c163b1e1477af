"""What the type checker knows of arrays, trees and maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

Array: TypeAlias = Any
"""An array of the backend's framework. Frameworks share no base class, so the type checker sees Any."""

Tree: TypeAlias = Any
"""Nested tuples, lists and dicts (and whatever else the framework registers) with arrays at the leaves."""

Map: TypeAlias = Callable[[Array], Array]
"""A function from `(batch, n)` to `(batch, n)`."""

LoopVars = TypeVar("LoopVars")


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


ParameterVjp: TypeAlias = Callable[[Array], tuple[Array, ...]]
"""`u ↦ (∂f/∂θ)ᵀu`: the gradients of the arrays θ that f depends on and that are differentiated."""
