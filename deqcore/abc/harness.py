"""A harness for measurements: tests, benchmarks and the study use it, a solve never does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from deqcore.abc.arrays import ArrayOps


class Switch(NamedTuple):
    """A setting of a whole process.

    Attributes:
        read: returns its value, which compares with `==`.
        write: sets it to a value that `read` has returned.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]


class Harness:
    """Compiles, waits and sets precision for tests and benchmarks.

    Example:
        >>> import deqcore
        >>> deqcore.get_backend(backend="numpy").harness.jit(abs)(-2.0)
        2.0
    """

    def __init__(self, be: ArrayOps) -> None:
        """Make the part of the backend `be`."""
        self.be = be

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return `fn` compiled if the backend has the capability `jit`, otherwise `fn` itself."""
        return fn

    def parameters(self, cell: Any) -> tuple[Any, Callable[[Any], Callable[..., Any]]]:
        """Return the parameters of a module as a tree of arrays, and a function from such a tree to the module with it.

        The default treats the cell as a function without parameters.
        """
        call: Callable[..., Any] = cell
        return (), lambda _: call

    def high_precision(self) -> AbstractContextManager[object]:
        """Enter the precision of the conformance suite: double precision enabled, and no product shortened (TF32)."""
        return nullcontext()

    def switches(self) -> dict[str, Switch]:
        """Return the settings of the process that foreign code may change: defaults of the framework and its seeds."""
        return {}

    def synchronize(self) -> None:
        """Wait until all devices have finished. Only measurements call it."""
        return None
