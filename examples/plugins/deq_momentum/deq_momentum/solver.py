"""Fixed-point iteration with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.solver import Solver
from deqcore.types import Array, Map


class MomentumState(NamedTuple):
    """What is carried from step to step: the latest step `(batch, n)`."""

    step: Array


@dataclass(frozen=True)
class Momentum(Solver):
    """The heavy-ball method, z ← z + (f(z) − z) + β (z − z₋).

    Args:
        beta: β, from 0 to below 1.

    Source: Polyak (1964), "Some methods of speeding up the convergence of iteration methods".
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta < 1.0:
            raise ValueError(f"beta must be a number from 0 to below 1 (got {self.beta})")

    def init(self, backend: Backend, z: Array, fz: Array) -> MomentumState:
        return MomentumState(backend.xp.zeros_like(z))

    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: Any) -> tuple[Array, Array, Any]:
        step = (fz - z) + self.beta * state.step
        z = z + step
        return z, f(z), MomentumState(step)
