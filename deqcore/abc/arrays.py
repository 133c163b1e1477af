"""The array operations that the parts of a backend use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from deqcore.types import Array, LoopVars, Tree


def is_inexact(dtype: str) -> bool:
    """Return whether a dtype of this name has derivatives: floating-point and complex numbers."""
    return "float" in dtype or "complex" in dtype


def precision_of(dtype: str, real: str) -> str:
    """Return the name of the dtype of the kind of `dtype`, real or complex, in the precision of the real dtype `real`.

    Example:
        >>> precision_of("complex128", "float32"), precision_of("float32", "float64")
        ('complex64', 'float64')
    """
    if "complex" not in dtype:
        return real
    return "complex128" if real == "float64" else "complex64"


class HostArrays(Protocol):
    """Views on the host, see `deqcore.abc.host.HostViews`."""

    def numpy_view(self, x: Array) -> Any | None:
        """See `HostViews`."""

    def from_numpy_view(self, x: Any) -> Array:
        """See `HostViews`."""


class RowNumbers(Protocol):
    """What scaling needs of numbers, see `deqcore.abc.numbers.NumberOps`."""

    def max_abs(self, v: Array, like: Array) -> Array:
        """See `NumberOps`."""

    def power_of_two(self, x: Array) -> Array:
        """See `NumberOps`."""


class ArrayOps(Protocol):
    """The methods of `deqcore.abc.backend.Backend` that its own parts call; they are documented there.

    The parts of a backend (`SmallLinalg`, `Autodiff`, …) see it by this protocol, so that `backend.py` can import their
    classes without a circle.
    """

    @property
    def xp(self) -> Any:
        """See `Backend`."""

    @property
    def host(self) -> HostArrays:
        """See `Backend`."""

    @property
    def numbers(self) -> RowNumbers:
        """See `Backend`."""

    def is_array(self, leaf: object) -> bool:
        """See `Backend`."""

    def asarray(self, a: object, *, dtype: str | None = None, like: Array | None = None) -> Array:
        """See `Backend`."""

    def flatten(self, tree: Tree) -> tuple[list[Any], Any]:
        """See `Backend`."""

    def unflatten(self, structure: Any, leaves: Sequence[Any]) -> Tree:
        """See `Backend`."""

    def dtype_name(self, x: Array) -> str:
        """See `Backend`."""

    def astype(self, x: Array, dtype: str) -> Array:
        """See `Backend`."""

    def detach(self, x: Array) -> Array:
        """See `Backend`."""

    def cast(self, x: Array, like: Array) -> Array:
        """See `Backend`."""

    def to_accum_dtype(self, x: Array) -> Array:
        """See `Backend`."""

    def eps(self, x: Array) -> float:
        """See `Backend`."""

    def select(self, mask: Array, new: Array, old: Array) -> Array:
        """See `Backend`."""

    def known_all(self, mask: Array) -> bool:
        """See `Backend`."""

    def cond(self, wanted: Array, body: Callable[[LoopVars], LoopVars], carry: LoopVars) -> LoopVars:
        """See `Backend`."""

    def scan(self, body: Callable[[LoopVars], LoopVars], carry: LoopVars, times: int) -> LoopVars:
        """See `Backend`."""

    def errstate(self) -> AbstractContextManager[object]:
        """See `Backend`."""
