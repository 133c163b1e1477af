"""Reuse of the forward solver's inverse-Jacobian estimate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from deqcore.backend import Array, Backend, Map
from deqcore.errors import StrategyError
from deqcore.linear.lowrank import InverseJacobian
from deqcore.strategy import AdjointReport, Strategy, report


@dataclass(frozen=True)
class BroydenReuse(Strategy):
    """u = −Hᵀg with the estimate H ≈ (J − I)^-1 that the forward solve left behind.

    One low-rank product in place of a linear solve. Right where the solver's secant pairs saw the directions that
    the cotangent needs; wrong without a word elsewhere, most of all with several slow modes and tight tolerances.

    Cost: two passes over the solver's history, no pull.

    Source: Ramzi et al. (2022), "SHINE: SHaring the INverse Estimate from the forward pass for bi-level optimization
    and implicit models", eq. (5).

    Example:
        >>> import numpy as np, deqcore
        >>> z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, np.zeros((1, 1)), np.ones((1, 1)),
        ...                        cotangent=np.ones((1, 1)), backward__strategy="broyden-reuse")
        >>> dx.round(6).tolist()
        [[2.0]]
    """

    needs: ClassVar[Literal["nothing", "pull", "estimate"]] = "estimate"

    def route(
        self, backend: Backend, pull: Map, g: Array, estimate: InverseJacobian | None
    ) -> tuple[Array, AdjointReport]:
        """Return −Hᵀg."""
        if estimate is None:
            raise StrategyError("broyden-reuse was called without an estimate; its solver promised one.")
        return -estimate.apply_transpose(g), report(backend, g)
