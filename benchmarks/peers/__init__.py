"""One small adapter per library. A library that is not installed has no contenders."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Final

from deqcore.bench.harness import Contender

LIBRARIES: Final = {"torch": ("torchdeq", "xitorch"), "jax": ("jaxopt", "optimistix", "anchorax", "banax")}
SKIPPED: Final = {"banax": "it needs Python 3.12 or later"} if sys.version_info < (3, 12) else {}


def peers(framework: str) -> list[Contender]:
    """Return the contenders of all libraries that are installed for this framework."""
    results: list[Contender] = []
    for name in LIBRARIES[framework]:
        if find_spec(name) is not None:
            results += import_module(f"benchmarks.peers.with_{name}").CONTENDERS
    return results
