"""The implicit function theorem, solved to a tolerance of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from deqcore.backend import Array, Backend, Map
from deqcore.driver import Control, drive
from deqcore.linear.gmres import gmres
from deqcore.linear.lowrank import InverseJacobian
from deqcore.solution import Status
from deqcore.solver import Solver
from deqcore.strategy import AdjointReport, MakeSolver, Strategy, relative, report


@dataclass(frozen=True)
class ExactIFT(Strategy):
    """Solve u = g + Jᵀu by GMRES or by any registered solver.

    The adjoint equation is linear, so GMRES needs the fewest pulls of all methods that see only products. A small
    `max_steps` is an honest, cheap choice: the residual that was reached is reported per sample.

    Cost: one pull per step, `max_steps` + 1 history vectors at most.

    Args:
        solver: "gmres", or a registered solver's name.
        rtol: relative adjoint residual, ‖g + Jᵀu − u‖ ≤ rtol·‖g‖; "auto" by dtype. Separate from the forward
            tolerance: an inexact forward solve must not loosen the gradient.
        max_steps: pulls at most.
        start: "zero" (GMRES), "cotangent" (u = g) or "reuse" (u = −Hᵀg, needs a solver with an estimate);
            "auto" is zero for GMRES and cotangent otherwise.
        options: the solver's own.
        bound: the solver itself; deqcore fills it in.

    Raises:
        ValueError: an option is out of its range. From settings it is the ConfigError that names the setting.

    Source: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models", Theorem 1; separate tolerances: docs/design.md.

    Example:
        >>> import numpy as np, deqcore
        >>> z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, np.zeros((1, 2)), np.ones((1, 2)),
        ...                        cotangent=np.ones((1, 2)), backward__strategy="exact-ift")
        >>> dx.round(6).tolist()
        [[2.0, 2.0]]
    """

    solver: str = "gmres"
    rtol: float | Literal["auto"] = "auto"
    max_steps: int = 40
    start: Literal["auto", "zero", "cotangent", "reuse"] = "auto"
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    bound: Solver | None = field(default=None, repr=False, metadata={"internal": True})
    needs: ClassVar[Literal["nothing", "pull", "estimate"]] = "pull"
    exact: ClassVar[bool] = True
    claims: ClassVar[Mapping[str, int]] = {
        "affine": 6,
        "conv": 13,
        "expansive": 6,
        "ill-conditioned": 8,
        "ring": 15,
        "slow-modes": 22,
        "tree": 12,
    }

    def __post_init__(self) -> None:
        if self.rtol != "auto" and not 0.0 <= self.rtol < 1.0:
            raise ValueError(f"rtol = {self.rtol}, but 'auto' or a number from 0 to below 1 is expected")
        if self.max_steps < 0:
            raise ValueError(f"max_steps = {self.max_steps}, but a number of at least 0 is expected")
        if self.start not in ("auto", "zero", "cotangent", "reuse"):
            raise ValueError(f"start = {self.start!r}, but 'auto', 'zero', 'cotangent' or 'reuse' is expected")
        if self.solver == "gmres" and set(self.options) - {"reorthogonalize"}:
            raise ValueError(f"options = {dict(self.options)}, but gmres has only 'reorthogonalize'")

    def bind(self, make_solver: MakeSolver) -> ExactIFT:
        """Make the solver that the options name."""
        return self if self.solver == "gmres" else replace(self, bound=make_solver(self.solver, self.options))

    def wants_estimate(self) -> bool:
        """Only a start from the reused estimate needs one."""
        return self.start == "reuse"

    def route(
        self, backend: Backend, pull: Map, g: Array, estimate: InverseJacobian | None
    ) -> tuple[Array, AdjointReport]:
        """Solve the adjoint equation for the cotangent `g` `(batch, n)`."""
        xp = backend.xp
        rtol = backend.default_rtol(g) if self.rtol == "auto" else float(self.rtol)

        def code(like: Array, status: Status) -> Array:
            return xp.full_like(like, int(status))

        u0 = self._start(g, estimate)
        if self.bound is None:
            found = gmres(
                backend,
                lambda u: u - pull(u),
                g,
                u0,
                rtol=rtol,
                max_steps=self.max_steps,
                reorthogonalize=bool(self.options.get("reorthogonalize", True)),
            )
            u, residual, pulls, converged = found
            budget = self.max_steps + (0 if u0 is None else 1)
            ended = xp.where(pulls < budget, code(pulls, Status.STALLED), code(pulls, Status.MAX_STEPS))
            status = xp.where(converged, code(pulls, Status.CONVERGED), ended)
        else:
            control = Control(rtol=0.0, atol=rtol * backend.norm(g), max_steps=self.max_steps)
            start = xp.zeros_like(g) if u0 is None else u0
            forward = drive(backend, self.bound, lambda u: g + pull(u), start, control)
            u, residual, pulls = forward.z, forward.residual, forward.evaluations
            # Without a solution u grows until g is lost in the rounding of Jᵀu: a difference of zero is no solution.
            residual = xp.maximum(residual, backend.cast(backend.eps(u) * backend.norm(u), residual))
            lost = (forward.status == int(Status.CONVERGED)) & ~(residual <= control.atol)
            status = xp.where(lost, code(pulls, Status.STALLED), forward.status)
        left = relative(backend, residual, backend.norm(g))
        status = xp.where(xp.isfinite(left), status, code(pulls, Status.NONFINITE))
        return u, report(backend, g, status=status, pulls=pulls, residual=left)

    def _start(self, g: Array, estimate: InverseJacobian | None) -> Array | None:
        """Where u begins; None is zero, for which GMRES needs no product."""
        if self.start == "reuse" and estimate is not None:
            return -estimate.apply_transpose(g)
        zero = self.start == "zero" or (self.start == "auto" and self.solver == "gmres")
        return None if zero else g
