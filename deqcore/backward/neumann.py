"""The truncated Neumann series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy, report
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.types import AdjointReport, Array, Map


@dataclass(frozen=True)
class Neumann(Strategy):
    """u = Σ_{k≤K} (Jᵀ)^k g, the first terms of (I − J)^-T g.

    Converges like plain iteration, at rate ρ(J); with the same number of vjps GMRES is never worse in the adjoint
    residual. Its use is a fixed, small, predictable cost.

    Cost: K vjps.

    Args:
        terms: K, at least 0; 0 is jacobian-free.

    Raises:
        ValueError: terms is below 0. From settings it is the ConfigError that names the setting.

    Source: Geng et al. (2021), "On training implicit models", eq. (9).

    Example:
        >>> import numpy as np, deqcore
        >>> z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, np.zeros((1, 2)), np.ones((1, 2)),
        ...                        cotangent=np.ones((1, 2)), backward__strategy="neumann",
        ...                        backward__options={"terms": 2})
        >>> dx.round(6).tolist()  # 1 + 1/2 + 1/4
        [[1.75, 1.75]]
    """

    terms: int = 5
    needs: ClassVar[Literal["nothing", "vjp", "estimate"]] = "vjp"
    causal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.terms < 0:
            raise ValueError(f"terms must be at least 0 (got {self.terms}).")

    def uses_vjp(self) -> bool:
        """Return whether there is at least one term."""
        return self.terms > 0

    def solve_adjoint(
        self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian | None
    ) -> tuple[Array, AdjointReport]:
        """Sum the series by Horner's rule, u ← g + Jᵀu."""
        u = backend.scan(lambda u: g + vjp(u), g, self.terms)
        return u, report(backend, g, vjps=self.terms)
