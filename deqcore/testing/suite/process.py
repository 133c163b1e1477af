"""What a subject may do to its process: settings, read before a test and restored after it, output and figures."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from deqcore.abc.backend import Backend
from deqcore.diagnostics.check.effects import PROCESS, restore, same


def _set_filters(filters: Any) -> None:
    warnings.filters[:] = filters  # type: ignore[index]


@dataclass(frozen=True)
class Settings:
    """The settings of Python, NumPy and a framework at one time.

    Attributes:
        backend: whose framework it is.
        values: by name.

    Example:
        >>> import deqcore, random
        >>> before = Settings.read(deqcore.get_backend(backend="numpy"))
        >>> random.seed(7)
        >>> before.restore()
        ['python random state']
    """

    backend: Backend
    values: Mapping[str, Any]

    @staticmethod
    def read(backend: Backend) -> Settings:
        """Read all of them."""
        own = {name: read() for name, (read, _) in {**PROCESS, **FILTERS}.items()}
        return Settings(backend, own | backend.harness.global_state())

    def restore(self) -> list[str]:
        """Set what has changed since to what it was, and return its names."""
        now = Settings.read(self.backend).values
        # A setting that an import has registered since does not count.
        changed = {name: value for name, value in self.values.items() if name in now and not same(value, now[name])}
        for name in changed.keys() & FILTERS.keys():
            FILTERS[name][1](changed[name])
        restore(self.backend, {name: value for name, value in changed.items() if name not in FILTERS})
        return list(changed)


FILTERS: Final[Mapping[str, tuple[Callable[[], Any], Callable[[Any], object]]]] = {
    "filters of warnings": (lambda: list(warnings.filters), _set_filters),
}
"""Left out by the check of layers, where the first call may import modules that add filters."""


def shown(capfd: Any) -> str:
    """Return what was printed or plotted since the last reading, or nothing. Figures are closed."""
    out, err = capfd.readouterr()
    pyplot = sys.modules.get("matplotlib.pyplot")
    figures = 0 if pyplot is None else len(pyplot.get_fignums())
    if pyplot is not None:
        pyplot.close("all")
    lines = (out + err).strip().splitlines()
    result = [f"it prints {lines[0][:200]!r}"] if lines else []
    return "; ".join([*result, *([f"it opens {figures} figure{'s' * (figures > 1)}"] if figures else [])])
