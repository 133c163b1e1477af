"""How far a right answer may be from the truth: bounds from tolerance, dtype and condition, to first order.

With A = I − J, a residual r of the forward solve moves z by at most ‖A⁻¹‖ ‖r‖, a residual of the adjoint equation
moves u by at most ‖A⁻¹‖ times it, and both reach a gradient through ‖∂f/∂θ‖ and through its change with z.

Rounding in inner products of n terms is taken as 5 √n eps: the worst case is n eps, but rounding errors behave like
independent numbers, and this is exceeded with probability below 1e-5.

Source: Higham (2002), "Accuracy and stability of numerical algorithms", §7; Higham & Mary (2019), "A new approach to
probabilistic rounding error analysis", Theorem 2.4 with λ = 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

LAMBDA: Final = 5.0
TIGHT: Final = 1e-12


class Slope(NamedTuple):
    """How errors reach one gradient.

    Attributes:
        product: ‖∂f/∂θ‖, which an error of u is multiplied with.
        curvature: ‖d gradient / dz‖, which an error of z is multiplied with.
    """

    product: float
    curvature: float


@dataclass(frozen=True)
class Sensitivity:
    """2-norms over the whole batch, at z*.

    Attributes:
        inverse: ‖(I − J)⁻¹‖.
        jacobian: ‖J‖.
        condition: ‖I − J‖ ‖(I − J)⁻¹‖.
        state: ‖z*‖.
        cotangent: ‖g‖.
        adjoint: ‖u‖, u = (I − J)^-T g.
        slopes: per gradient, by leaf name; `cotangent` is u itself.
    """

    inverse: float
    jacobian: float
    condition: float
    state: float
    cotangent: float
    adjoint: float
    slopes: Mapping[str, Slope]

    def bounds(self, eps: float, n: int, forward: float, backward: float) -> dict[str, float]:
        """Return largest 2-norm of the error of z* (`value`) and of each gradient that tolerances and dtype explain.

        Args:
            eps: machine epsilon of the dtype.
            n: size of a sample's state.
            forward: relative tolerance of the forward solve.
            backward: relative tolerance of the adjoint solve.
        """
        unit = rounding(eps, n)
        residual = (forward + unit) * self.state
        z = self.inverse * residual
        u = self.inverse * (backward * self.cotangent + unit * (1.0 + self.jacobian) * self.adjoint)
        result = {"value": z + residual}
        for name, slope in self.slopes.items():
            result[name] = slope.product * (u + unit * self.adjoint) + slope.curvature * z
        return result


def rounding(eps: float, n: int) -> float:
    """Return the relative rounding error of an inner product of n terms."""
    return LAMBDA * math.sqrt(max(n, 1)) * eps


def tolerance(eps: float, n: int) -> float:
    """Return what to ask of a solver in a check: 1e-12, or twice what rounding in this dtype leaves."""
    return max(TIGHT, 2 * rounding(eps, n))
