"""An estimate of a solver, transposed: what forward mode and second derivatives need, where J stands for Jᵀ."""

from __future__ import annotations

from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.types import Array


def transposed(estimate: InverseJacobian) -> InverseJacobian:
    """Hᵀ as an operator."""
    return estimate.inner if isinstance(estimate, _Transposed) else _Transposed(estimate)


class _Transposed(InverseJacobian):
    def __init__(self, inner: InverseJacobian) -> None:
        self.inner = inner

    def apply(self, v: Array) -> Array:
        return self.inner.apply_transpose(v)

    def apply_transpose(self, v: Array) -> Array:
        return self.inner.apply(v)

    def known(self) -> Array | None:
        return self.inner.known()
