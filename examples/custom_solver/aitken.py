"""A solver in one file: damped iteration that learns its damping (Aitken's Δ², for vectors).

It is written once and runs on PyTorch, JAX and NumPy: array operations go through `backend.xp`, inner
products through the backend (which accumulates them in a wide dtype), and the state is a NamedTuple whose
shapes never change. Tolerances, freezing of finished samples and the best iterate are the loop's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.scaling import divide_rows, row_scale
from deqcore.abc.solver import Solver
from deqcore.types import Array, Map


class AitkenState(NamedTuple):
    """What the next step needs to know about the last one."""

    residual: Array  # f(z) − z at the last iterate, (batch, n)
    damping: Array  # (batch,)


@dataclass(frozen=True)
class Aitken(Solver):
    """z ← z + ω (f(z) − z), with ω from the last two residuals, per sample.

    With r = f(z) − z and Δ = r − r_last, the damping that would have sent the residual to zero, were f linear
    along the last step, is

        ω = −ω_last · ⟨r_last, Δ⟩ / ⟨Δ, Δ⟩.

    Cost: one evaluation of f per step and one stored vector per sample. Between Picard (nothing stored) and
    Anderson (several vectors): use it when one slow mode dominates.

    Args:
        first: ω of the first step.
        largest: bound on |ω|; a flat residual would otherwise give an enormous step.

    Source: Irons & Tuck (1969), "A version of the Aitken accelerator for computer iteration"; Küttler & Wall
    (2008), "Fixed-point fluid–structure interaction solvers with dynamic relaxation", Eq. 44.
    """

    first: float = 1.0
    largest: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.largest:
            raise ValueError(f"first must be a number above 0 and up to {self.largest} (got {self.first})")

    def init(self, backend: Backend, z: Array, fz: Array) -> AitkenState:
        r = fz - z
        return AitkenState(r, backend.xp.full_like(backend.to_accum_dtype(backend.norm(r)), self.first))

    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: AitkenState) -> tuple[Array, Array, Any]:
        xp = backend.xp
        r = fz - z
        delta = r - state.residual
        # Products of vectors overflow or vanish long before the vectors do: bring them to about 1 first.
        unit = row_scale(backend, backend.norm(delta), delta)
        delta, last = divide_rows(backend, delta, unit), divide_rows(backend, state.residual, unit)
        square = backend.inner(delta, delta)
        # The first step has no difference yet. Keep the damping and divide by one.
        moved = square > 0
        ratio = backend.inner(last, delta) / xp.where(moved, square, xp.ones_like(square))
        known = moved & (backend.inner(last, last) > 0)  # a restart leaves a last residual of zero
        damping = xp.where(known, -state.damping * ratio, state.damping)
        damping = xp.clip(damping, -self.largest, self.largest)
        z = z + backend.cast(damping, z)[:, None] * r
        return z, f(z), AitkenState(r, damping)
