"""What the type checker knows of arrays, trees and maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

Array: TypeAlias = Any
"""An array of the backend's framework. Frameworks share no base class, so the type checker sees Any."""

Tree: TypeAlias = Any
"""Nested tuples, lists and dicts (and whatever else the framework registers) with arrays at the leaves."""

Map: TypeAlias = Callable[[Array], Array]
"""A function from `(batch, n)` to `(batch, n)`."""

LoopVars = TypeVar("LoopVars")

ParameterVjp: TypeAlias = Callable[[Array], tuple[Array, ...]]
"""`u ↦ (∂f/∂θ)ᵀu`: the gradients of the arrays θ that f depends on and that are differentiated."""
