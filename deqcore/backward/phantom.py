"""The phantom gradient: a few damped, recorded steps from the solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deqcore.abc.backend import Backend
from deqcore.abc.backward import StepStrategy
from deqcore.abc.solver import Solver
from deqcore.errors import StrategyError
from deqcore.types import Array, Map, SolveResult


@dataclass(frozen=True)
class Phantom(StepStrategy):
    """Differentiate z ← z + λ (f(z) − z), k times from z*.

    The gradient is Σ_{j<k} λ (I − λ(I − J))^jᵀ applied to the cotangent: a damped Neumann series, which converges
    to the exact one as k grows wherever the damped iteration contracts. Memory grows with k, as for any unrolling.

    Cost: k recorded evaluations of f.

    Args:
        steps: k, at least 1.
        damping: λ in (0, 1].

    Raises:
        ValueError: an option is out of its range. From settings it is the ConfigError that names the setting.

    Source: Geng et al. (2021), "On training implicit models", eq. (7).

    Example:
        >>> import numpy as np, deqcore
        >>> z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, np.zeros((1, 1)), np.ones((1, 1)),
        ...                        cotangent=np.ones((1, 1)), backward__strategy="phantom",
        ...                        backward__options={"steps": 2, "damping": 1.0})
        >>> dx.round(6).tolist()  # 1 + 1/2
        [[1.5]]
    """

    steps: int = 5
    damping: float = 0.5
    causal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1 (got {self.steps}).")
        if not 0.0 < self.damping <= 1.0:
            raise ValueError(f"damping must be above 0 and at most 1 (got {self.damping}).")

    def value(self, backend: Backend, f: Map, z0: Array, forward: SolveResult | None, solver: Solver) -> Array:
        """Take the steps from the solution."""
        if forward is None:
            raise StrategyError("phantom starts from the solution. Pass the result of the forward solve (got None).")

        def step(z: Array) -> Array:
            fz = f(z)
            return fz if self.damping == 1.0 else z + self.damping * (fz - z)

        value: Array = backend.scan(step, backend.detach(forward.z), self.steps)
        return value
