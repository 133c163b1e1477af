"""Settings of the process that a solver may change: read before a test, restored after it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.diagnostics.check.effects import same


def _set_filters(filters: Any) -> None:
    warnings.filters[:] = filters  # type: ignore[index]


@dataclass(frozen=True)
class Settings:
    """The settings of Python, NumPy and a framework at one time.

    Attributes:
        backend: whose framework it is.
        values: by name.

    Example:
        >>> import deqcore
        >>> before = Settings.read(deqcore.get_backend(backend="numpy"))
        >>> random.seed(7)
        >>> before.restore()
        ["Python's seed"]
    """

    backend: Backend
    values: Mapping[str, Any]

    @staticmethod
    def read(backend: Backend) -> Settings:
        """Read all of them."""
        own = {name: read() for name, (read, _) in COMMON.items()}
        return Settings(backend, own | backend.harness.global_state())

    def restore(self) -> list[str]:
        """Set what has changed since to what it was, and return its names."""
        now = Settings.read(self.backend).values
        # A setting that an import has registered since does not count.
        changed = {name: value for name, value in self.values.items() if name in now and not same(value, now[name])}
        for name in changed.keys() & COMMON.keys():
            COMMON[name][1](changed[name])
        self.backend.harness.restore_global_state({name: changed[name] for name in changed if name not in COMMON})
        return list(changed)


COMMON: Final[Mapping[str, tuple[Callable[[], Any], Callable[[Any], object]]]] = {
    "NumPy's handling of errors": (np.geterr, lambda state: np.seterr(**state)),
    "NumPy's seed": (np.random.get_state, np.random.set_state),
    "Python's seed": (random.getstate, random.setstate),
    "filters of warnings": (lambda: list(warnings.filters), _set_filters),
}
"""How each setting of Python and NumPy is read and set."""
