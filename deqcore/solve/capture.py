"""Compilers of Python code that trace a call of `fixed_point`, and what they see instead of a solve.

A backend adds its compiler when the module that its `BackendSpec` names is loaded. The list is read in compiled code,
so it holds plain functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from deqcore.plugins import lookup
from deqcore.solution import Solution

Capture: TypeAlias = Callable[[Any, Any, tuple[Any, ...], dict[str, object], tuple[int, ...]], Solution | None]

_compilers: list[tuple[Callable[[], bool], Capture]] = []


def add_compiler(traces: Callable[[], bool], capture: Capture) -> None:
    """Add a compiler.

    Args:
        traces: returns whether the compiler traces its caller.
        capture: `(f, z0, args, overrides, batched_args)` to what the compiler sees, or None if it cannot; then the
            solve runs in Python, outside of the compiled code.
    """
    _compilers.append((traces, capture))


def captured(
    f: Any, z0: Any, args: tuple[Any, ...], overrides: dict[str, object], batched_args: tuple[int, ...]
) -> Solution | None:
    """Return what a compiler that traces this call sees; None if none does."""
    _load()  # first: a compiler reads the list once
    for traces, capture in _compilers:
        if traces():
            return capture(f, z0, args, overrides, batched_args)
    return None


def _load() -> None:
    if not _compilers:
        lookup.load_compilers()


_load._dynamo_marked_constant = True  # type: ignore[attr-defined] # torch.compile runs it, and does not trace it
