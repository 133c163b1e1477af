"""Jacobian-free backpropagation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy, report
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.types import AdjointReport, Array, Map


@dataclass(frozen=True)
class JacobianFree(Strategy):
    """u = g: treat the inverse of I − J as the identity.

    The gradient of one step of f at z*. A descent direction if f is a strong contraction; otherwise biased by an
    amount that nothing here measures: ‖Jᵀg‖/‖g‖ is its adjoint residual.

    Cost: nothing beyond the recorded evaluation of f.

    Source: Fung et al. (2022), "JFB: Jacobian-free backpropagation for implicit networks", eq. (9).

    Example:
        >>> import numpy as np, deqcore
        >>> z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, np.zeros((1, 2)), np.ones((1, 2)),
        ...                        cotangent=np.ones((1, 2)), backward__strategy="jacobian-free")
        >>> dx.round(6).tolist()  # the exact answer is 2
        [[1.0, 1.0]]
    """

    needs: ClassVar[Literal["nothing", "vjp", "estimate"]] = "nothing"
    causal: ClassVar[bool] = True

    def solve_adjoint(
        self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian | None
    ) -> tuple[Array, AdjointReport]:
        """Return g."""
        return g, report(backend, g)
