"""Damped Richardson iteration on (I − Jᵀ) u = g, with its residual measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy, report
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.types import AdjointReport, Array, Map


@dataclass(frozen=True)
class Richardson(Strategy):
    """u ← u + ω (g + Jᵀu − u), `steps` times from u = g; the last residual is reported.

    Args:
        steps: at least 0.
        damping: ω in (0, 1].

    Source: Saad (2003), "Iterative methods for sparse linear systems", §4.2.1.
    """

    steps: int = 5
    damping: float = 0.8
    needs: ClassVar[Literal["nothing", "vjp", "estimate"]] = "vjp"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0 (got {self.steps})")
        if not 0.0 < self.damping <= 1.0:
            raise ValueError(f"damping must be a number above 0 and at most 1 (got {self.damping})")

    def solve_adjoint(
        self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian | None
    ) -> tuple[Array, AdjointReport]:
        u, left = g, vjp(g)
        for _ in range(self.steps):
            u = u + self.damping * left
            left = g + vjp(u) - u
        xp, size = backend.xp, backend.norm(g)
        relative = backend.norm(left) / xp.where(size > 0, size, xp.ones_like(size))
        return u, report(backend, g, vjps=self.steps + 1, residual=relative)
