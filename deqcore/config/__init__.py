"""Settings: their sources, and which of them apply.

`Config` and the functions that resolve the settings of a call are in `deqcore.config.config`, the settings themselves
in `deqcore.config.sections`, their sources in `sources` and `environment`. Names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from deqcore.lazy import lazy_names

if TYPE_CHECKING:
    from deqcore.config.config import FILE, Config, current, override, resolve, using

__all__: Final = ["FILE", "Config", "current", "override", "resolve", "using"]

__getattr__, __dir__ = lazy_names(__name__, {"deqcore.config.config": __all__})
