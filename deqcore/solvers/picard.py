"""Damped fixed-point (Picard) iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from deqcore.abc.backend import Backend
from deqcore.abc.solver import Solver
from deqcore.types import Array, Map


@dataclass(frozen=True)
class Picard(Solver):
    """Damped fixed-point iteration, z ← z + τ (f(z) − z).

    Converges linearly, at rate ρ(J) for τ = 1, if f is a contraction near z*. Its step is the cheapest: use it when f
    contracts strongly or a few digits are enough. Damping extends convergence: if all eigenvalues of J have a real
    part below 1, the iteration contracts for τ small enough.

    Cost: one evaluation of f per step, no history.

    Args:
        damping: τ, in (0, 2).

    Raises:
        ValueError: damping is not in (0, 2). In settings it becomes a ConfigError that names the setting.

    Source: Picard (1890); Kelley, "Iterative Methods for Linear and Nonlinear Equations" (1995), §4.2.

    Example:
        >>> import numpy as np, deqcore
        >>> sol = deqcore.fixed_point(np.cos, np.ones((1, 1)), forward__solver="picard", forward__rtol=1e-6)
        >>> round(float(sol.value[0, 0]), 4)
        0.7391
    """

    damping: float = 1.0
    causal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 < self.damping < 2.0:
            raise ValueError(f"damping must be between 0 and 2 (got {self.damping})")

    def init(self, backend: Backend, z: Array, fz: Array) -> Any:
        """Return an empty state."""
        return ()

    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: Any) -> tuple[Array, Array, Any]:
        """Take one damped step."""
        z = fz if self.damping == 1.0 else z + self.damping * (fz - z)
        return z, f(z), state

    def chord(self, backend: Backend, z: Array, fz: Array, state: Any) -> Array | None:
        """Return None, because a step does not divide by differences."""
        return None
