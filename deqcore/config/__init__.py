"""Settings: their sources, and which of them apply.

`Config` and the functions that resolve the settings of a call are in `deqcore.config.config`, the settings themselves
in `deqcore.config.sections`, their sources in `sources` and `environment`. Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from deqcore.config.config import FILE, Config, current, override, resolve, using

__all__: Final = ["FILE", "Config", "current", "override", "resolve", "using"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'deqcore.config' has no attribute {name!r}")
    value: object = getattr(import_module("deqcore.config.config"), name)
    globals()[name] = value
    return value
