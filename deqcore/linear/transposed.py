"""The estimates of a solver, transposed: what forward mode and second derivatives need, where J stands for Jᵀ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from deqcore.abc.backend import Backend
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.solver import Solver
from deqcore.solve.adjoint import Adjoint
from deqcore.types import Array


def transposed(adjoint: Adjoint) -> Adjoint:
    """The same strategy for x = b + J x: give it the product with J in place of that with Jᵀ."""
    solver = adjoint.solver
    if isinstance(solver, _Transposed):
        return replace(adjoint, solver=solver.solver)
    return replace(adjoint, solver=cast(Solver, _Transposed(solver)))


@dataclass(frozen=True)
class _Transposed:
    """A solver whose estimates are those of another one, transposed."""

    solver: Solver

    def inverse_jacobian(self, backend: Backend, state: Any) -> InverseJacobian | None:
        return _turn(self.solver.inverse_jacobian(backend, state))

    def secant_estimate(self, backend: Backend, state: Any) -> InverseJacobian | None:
        return _turn(self.solver.secant_estimate(backend, state))


def _turn(estimate: InverseJacobian | None) -> InverseJacobian | None:
    return None if estimate is None else _TransposedEstimate(estimate)


@dataclass(frozen=True)
class _TransposedEstimate(InverseJacobian):
    inner: InverseJacobian

    def apply(self, v: Array) -> Array:
        return self.inner.apply_transpose(v)

    def apply_transpose(self, v: Array) -> Array:
        return self.inner.apply(v)
