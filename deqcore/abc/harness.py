"""A harness for measurements: tests, benchmarks, diagnostics and the study use it, a solve never does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from deqcore.abc.arrays import ArrayOps
from deqcore.errors import BackendError
from deqcore.types import Array, Tree


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

    def jit_once(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return `fn` compiled for a few calls that are not timed: sooner, by a compiler that optimizes less."""
        return self.jit(fn)

    def parameters(self, cell: Any) -> tuple[Any, Callable[[Any], Callable[..., Any]]]:
        """Return the parameters of a module as a tree of arrays, and a function from such a tree to the module with it.

        The default treats the cell as a function without parameters.
        """
        call: Callable[..., Any] = cell
        return (), lambda _: call

    def module_arrays(self, module: Any) -> dict[str, Array]:
        """Return all arrays of a module by name: parameters, buffers and statistics. Empty for a plain function."""
        return {}

    def preserved(self, module: Any) -> AbstractContextManager[Any]:
        """Enter a module to call freely: after the block, the arrays of the user's own module are as before it."""
        return nullcontext(module)

    def in_trace(self, module: Any) -> Any:
        """Return a module to call inside a function that is differentiated, where it may write its statistics."""
        return module

    def module_gradients(
        self, module: Any, call: Callable[..., Array], inputs: tuple[Tree, ...], cotangent: Array
    ) -> dict[str, Array] | None:
        """Differentiate a call of a module as it stands, with its hooks and custom derivatives.

        Args:
            module: whose trained parameters get gradients.
            call: `call(module, *inputs)` returns an array.
            inputs: trees, whose floating-point arrays get gradients too.
            cotangent: of the array that `call` returns.

        Returns:
            Gradients by name, zeros where there is none: the parameters' names, and ``inputs[0]`` and so on. None if
            the framework has no modules, so that its functions are differentiated by `Autodiff.vjp`.
        """
        return None

    def converted(self, module: Any, *, dtype: str | None = None, device: str | None = None) -> Any:
        """Return a copy of a module with arrays of another precision, or on another device.

        Args:
            module: the module, which stays what it is.
            dtype: of floating-point arrays; complex ones get the complex dtype of this precision.
            device: name of a device.

        Raises:
            BackendError: the framework has no modules to convert.
        """
        if dtype is None and device is None:
            return module
        raise BackendError("The module must belong to a framework with modules (this backend only has functions).")

    def devices(self) -> tuple[str, ...]:
        """Return the names of the kinds of device that this process can use, the host first."""
        return ("cpu",)

    def global_state(self) -> dict[str, Any]:
        """Return the framework's global settings and the state of its random generator, by name."""
        return {}

    def restore_global_state(self, state: dict[str, Any]) -> None:
        """Set what `global_state` returned."""

    def high_precision(self) -> AbstractContextManager[object]:
        """Enter the precision of the conformance suite: double precision enabled, and no product shortened (TF32)."""
        return nullcontext()

    def synchronize(self) -> None:
        """Wait until all devices have finished. Only measurements call it."""
        return None

    def peak_memory(self, fn: Callable[..., Any], *args: Array) -> int:
        """Return how many bytes of arrays `fn(*args)` holds at once, at most, beyond its arguments; it runs `fn`.

        By the allocator of Python and NumPy, of the framework, or of the compiled program; never the memory of the
        process. The default asks `tracemalloc`, which counts small Python objects as well.
        """
        import tracemalloc

        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            fn(*args)
            return tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
