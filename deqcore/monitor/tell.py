"""Warnings of the monitor, which point at the line of the user that led to them."""

from __future__ import annotations

import sys
import warnings

from deqcore.errors import MonitorWarning


def tell(text: str) -> None:
    """Warn."""
    depth, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0].startswith("deqcore"):
        frame, depth = frame.f_back, depth + 1
    warnings.warn(text, MonitorWarning, stacklevel=depth)
