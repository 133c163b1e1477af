"""Solvers that no tracing framework can run, each with one vice. They are registered by the tests that need them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deqcore import Solver, plugins


@dataclass(frozen=True)
class Plain(Solver):
    """What all of them would be without their vice."""

    def init(self, backend, z, fz):
        return ()

    def step(self, backend, f, z, fz, state):
        return fz, f(fz), state


class Branches(Plain):
    """if on an array."""

    def step(self, backend, f, z, fz, state):
        if backend.xp.max(backend.norm(fz - z)) > 1e3:
            return z, fz, state
        return fz, f(fz), state


class Floats(Plain):
    """float() of an array."""

    def step(self, backend, f, z, fz, state):
        scale = float(backend.xp.max(backend.norm(fz - z)))
        z = z + min(1.0, 1e9 / (scale + 1e-9)) * (fz - z)
        return z, f(z), state


class Writes(Plain):
    """Writes to an element."""

    def step(self, backend, f, z, fz, state):
        z = fz + 0
        z[0] = fz[0]
        return z, f(z), state


class Masks(Plain):
    """Picks rows with a mask."""

    def step(self, backend, f, z, fz, state):
        moving = (fz - z)[backend.norm(fz - z) > 0]
        return fz + 0 * backend.xp.sum(moving), f(fz), state


class Iterates(Plain):
    """Python's max over the samples."""

    def step(self, backend, f, z, fz, state):
        worst = max(backend.norm(fz - z))
        return fz + 0 * worst, f(fz), state


class Numpy(Plain):
    """A NumPy function on an array of whatever framework."""

    def step(self, backend, f, z, fz, state):
        size = np.linalg.norm(fz - z)
        return fz + 0 * size, f(fz), state


class Counts(Plain):
    """A Python loop as long as an array says."""

    def step(self, backend, f, z, fz, state):
        for _ in range(backend.xp.astype(backend.xp.sum(0 * z) + 1, backend.xp.int32)):
            z, fz = fz, f(fz)
        return z, fz, state


class One(NamedTuple):
    value: Any


class Widens(Plain):
    """The state changes its dtype."""

    def init(self, backend, z, fz):
        return One(backend.xp.zeros_like(backend.norm(z), dtype=backend.xp.int32))

    def step(self, backend, f, z, fz, state):
        return fz, f(fz), One(0.5 * backend.norm(fz - z))


class Grows(Plain):
    """The state changes its shape."""

    def init(self, backend, z, fz):
        return One(z[:, None, :])

    def step(self, backend, f, z, fz, state):
        return fz, f(fz), One(backend.xp.concat([state.value, fz[:, None, :]], axis=1))


class Restructures(Plain):
    """The state changes its structure."""

    def init(self, backend, z, fz):
        return (None, z)

    def step(self, backend, f, z, fz, state):
        return fz, f(fz), (z, z)


class Outlandish(Plain):
    """A function that is in NumPy's namespace but in no standard."""

    def step(self, backend, f, z, fz, state):
        size = backend.xp.nonzero(fz - z)[0]
        return fz + 0 * size.shape[0], f(fz), state


BAD = {
    "branches": (Branches, "truth value"),
    "floats": (Floats, "Python float"),
    "writes": (Writes, "written to"),
    "masks": (Masks, "indexed with a mask"),
    "iterates": (Iterates, "iterated over"),
    "numpy-function": (Numpy, "NumPy function"),
    "counts": (Counts, "index or a length"),
    "widens": (Widens, "must stay the same"),
    "grows": (Grows, "must stay the same"),
    "restructures": (Restructures, "must stay the same"),
    "outlandish": (Outlandish, "shape depends on values"),
}


def register() -> None:
    """Make all of them known in this process."""
    for name, (cls, _) in BAD.items():
        plugins.register(plugins.SolverSpec(name, f"{__name__}:{cls.__name__}"))
