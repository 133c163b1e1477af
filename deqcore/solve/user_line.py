"""Warnings that point at the user's code, from whatever thread or time, and not too often."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any, Final

INSIDE: Final = frozenset(
    (
        *("deqcore", "deqcore_torch", "deqcore_jax", "deqcore_numpy"),
        *("torch", "jax", "flax", "equinox", "optax", "optree", "functools", "contextlib", "threading"),
        *("lightning", "pytorch_lightning", "accelerate", "transformers"),
    )
)


@dataclass(frozen=True)
class Line:
    """A line of the user's code, as `warnings.warn_explicit` wants it. Equal lines have one file and one number."""

    filename: str
    lineno: int
    module: str = field(compare=False)
    registry: dict[Any, Any] = field(compare=False, repr=False)


def user_line() -> Line:
    """Find the innermost line outside of this package and of the frameworks that call it."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        frame = frame.f_back
    module = frame.f_globals
    registry: dict[Any, Any] = module.setdefault("__warningregistry__", {})
    return Line(frame.f_code.co_filename, frame.f_lineno, module.get("__name__", "<unknown>"), registry)


def warn(text: str, category: type[Warning], line: Line | None = None) -> None:
    """Warn at a line of the user's code, in whatever thread this is; the default is the line that runs now."""
    line = line or user_line()
    warnings.warn_explicit(text, category, line.filename, line.lineno, line.module, line.registry)


def due(count: int) -> bool:
    """Return whether to show the next warning after `count` of them: the 1st, 10th, 100th and so on."""
    return str(count + 1).strip("0") == "1"
