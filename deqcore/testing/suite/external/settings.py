"""Settings of the process that a solver may change: read before a test, restored after it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.harness import Switch


def _numpy_seed() -> Any:
    state: Any = np.random.get_state()
    kind, key, *rest = state
    return (kind, bytes(key), *rest)


def _set_numpy_seed(state: Any) -> None:
    kind, key, *rest = state
    np.random.set_state((kind, np.frombuffer(key, np.uint32), *rest))


def _set_filters(filters: Any) -> None:
    warnings.filters[:] = filters  # type: ignore[index]


COMMON: Mapping[str, Switch] = {
    "NumPy's handling of errors": Switch(np.geterr, lambda state: np.seterr(**state)),
    "NumPy's seed": Switch(_numpy_seed, _set_numpy_seed),
    "Python's seed": Switch(random.getstate, random.setstate),
    "filters of warnings": Switch(lambda: list(warnings.filters), _set_filters),
}


@dataclass(frozen=True)
class Settings:
    """The values of all switches at one time.

    Attributes:
        switches: by name.
        values: by name.

    Example:
        >>> import deqcore
        >>> before = Settings.read(deqcore.get_backend(backend="numpy"))
        >>> random.seed(7)
        >>> before.restore()
        ["Python's seed"]
    """

    switches: Mapping[str, Switch]
    values: Mapping[str, Any]

    @staticmethod
    def read(backend: Backend) -> Settings:
        """Read all switches of Python, NumPy and the framework."""
        switches = {**COMMON, **backend.harness.switches()}
        return Settings(switches, {name: switch.read() for name, switch in switches.items()})

    def restore(self) -> list[str]:
        """Set what has changed since to what it was, and return its names."""
        changed = [name for name, switch in self.switches.items() if switch.read() != self.values[name]]
        for name in changed:
            self.switches[name].write(self.values[name])
        return changed
