"""The JAX backend of deqcore.

Modules are imported when they are first used: `deqcore_jax.adjoint_tap` (reports of backward passes), `deqcore_jax.nnx`
and `deqcore_jax.equinox` (layers).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Final

PUBLIC: Final = ("equinox", "nnx", "adjoint_tap")


def __getattr__(name: str) -> ModuleType:
    if name in PUBLIC:
        return import_module(f"deqcore_jax.{name}")
    raise AttributeError(f"module 'deqcore_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
