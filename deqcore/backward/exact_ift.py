"""The implicit function theorem, solved to a tolerance of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Final, Literal

from deqcore.abc.backend import Backend
from deqcore.abc.backward import MakeSolver, Strategy, relative, report
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.solver import Solver
from deqcore.backward.to_error import Reuse, check_reuse, solve_to_error, statuses, target_of
from deqcore.linear.direct import Direct, solve_direct
from deqcore.linear.gmres import LinearSolution, gmres
from deqcore.linear.norms import default_rtol
from deqcore.linear.opening import UNKNOWNS, opened
from deqcore.linear.plain_steps import MANY, plain_or_gmres
from deqcore.solve.loop import iterate
from deqcore.types import AdjointReport, Array, Map, Status, StoppingCriteria

SPACE: Final = 40
"""Dimensions of a Krylov space, after which GMRES restarts: more would cost traced code, which passes over all of them
in every step, time on every solve."""

MORE_STEPS: Final = 8
"""Steps beyond one for each unknown, for what rounding and restarts lose."""

MOST_STEPS: Final = 200
"""Steps that an automatic budget gives at most."""


@dataclass(frozen=True)
class ExactIFT(Strategy):
    """Solve u = g + Jᵀu by GMRES or by any registered solver.

    The adjoint equation is linear, so GMRES needs the fewest vjps of all methods that see only products. Where it
    fails and the system is small, I − Jᵀ is built by one vjp for each unknown and solved by elimination; only the
    samples that failed take that result. A small `max_steps` is an honest, cheap choice: the residual that was reached
    is reported per sample.

    Cost: one vjp per step and `SPACE` + 1 history vectors at most. The direct solve adds n + 1 vjps and n² numbers
    per sample.

    Args:
        solver: "gmres", or a registered solver's name.
        rtol: relative adjoint residual, ‖g + Jᵀu − u‖ ≤ rtol·‖g‖; "auto" by dtype. Separate from the forward
            tolerance: an inexact forward solve must not loosen the gradient.
        max_relative_error: stop at this *estimated relative error* of u instead, in (0, 1); None ("none" in a file) for
            `rtol`. GMRES only, from zero. The report has the estimate; it is not a bound.
        reuse: what the forward solve's estimate does for `max_relative_error`: "none", so that any solver will do;
            "witness", it judges the error, which saves vjps; "precondition", it also preconditions GMRES.
        max_steps: steps at most, each of which is a vjp, those of the direct solve included; a solver other than GMRES
            takes one vjp more to begin. "auto" gives GMRES n + 8 and at most 200 of them, and the direct solve its
            n + 1 more. "auto" also lets samples that contract well take at most 60 plain steps u ← g + Jᵀu: in traced
            code with 128 unknowns or more before GMRES (`deqcore.linear.opening`), and in PyTorch on the CPU with 512
            or more after the first steps of GMRES (`deqcore.linear.plain_steps`).
        start: "zero" (GMRES), "cotangent" (u = g) or "reuse" (u = −Hᵀg, needs a solver with an estimate);
            "auto" is zero for GMRES and cotangent otherwise.
        direct: largest number of unknowns n for which a sample that GMRES cannot solve is solved directly; 0 for none.
        options: the solver's own; of GMRES `reorthogonalize` and `opening`, which is False for no plain steps.
        bound: the solver itself; deqcore fills it in.

    Raises:
        ValueError: an option is out of its range. From settings it is the ConfigError that names the setting.

    Source: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models", Theorem 1; separate tolerances: docs/notes.

    Example:
        >>> import numpy as np, deqcore
        >>> z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, np.zeros((1, 2)), np.ones((1, 2)),
        ...                        cotangent=np.ones((1, 2)), backward__strategy="exact-ift")
        >>> dx.round(6).tolist()
        [[2.0, 2.0]]
    """

    solver: str = "gmres"
    rtol: float | Literal["auto"] = "auto"
    max_relative_error: float | Literal["none"] | None = None
    reuse: Reuse = "none"
    max_steps: int | Literal["auto"] = "auto"
    start: Literal["auto", "zero", "cotangent", "reuse"] = "auto"
    direct: int = 512
    options: Mapping[str, object] = field(default_factory=dict, hash=False)
    bound: Solver | None = field(default=None, repr=False, metadata={"internal": True})
    needs: ClassVar[Literal["nothing", "vjp", "estimate"]] = "vjp"
    causal: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    cost_bounds: ClassVar[Mapping[str, int]] = {
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
            raise ValueError(f"rtol must be 'auto' or a number from 0 to below 1 (got {self.rtol}).")
        object.__setattr__(self, "max_relative_error", target_of(self.max_relative_error))
        check_reuse(self.reuse)
        if self.max_relative_error is not None:
            self._check_target()
        if self.max_steps != "auto" and self.max_steps < 0:
            raise ValueError(f"max_steps must be 'auto' or at least 0 (got {self.max_steps}).")
        if self.direct < 0:
            raise ValueError(f"direct must be at least 0 (got {self.direct}).")
        if self.start not in ("auto", "zero", "cotangent", "reuse"):
            raise ValueError(f"start must be 'auto', 'zero', 'cotangent' or 'reuse' (got {self.start!r}).")
        if self.solver == "gmres" and set(self.options) - {"reorthogonalize", "opening"}:
            raise ValueError(f"gmres has only the options 'reorthogonalize' and 'opening' (got {dict(self.options)}).")

    def _check_target(self) -> None:
        if self.rtol != "auto":
            raise ValueError("rtol and max_relative_error are two targets. Set one of them.")
        if self.solver != "gmres":
            raise ValueError(f"max_relative_error needs the solver 'gmres' (got {self.solver!r}). Set rtol instead.")
        if self.start not in ("auto", "zero"):
            raise ValueError(f"max_relative_error needs the start 'zero' (got {self.start!r}). Remove `start`.")

    def bind(self, make_solver: MakeSolver) -> ExactIFT:
        """Make the solver that the options name."""
        return self if self.solver == "gmres" else replace(self, bound=make_solver(self.solver, self.options))

    def wants_estimate(self) -> bool:
        """Return whether the solve starts from the forward solver's estimate, or reuses it otherwise."""
        return self.start == "reuse" or self._reuses()

    def wants_secants(self) -> bool:
        """Return whether a witness or preconditioner is wanted: they use the estimate that keeps all pairs."""
        return self._reuses()

    def _reuses(self) -> bool:
        return self.max_relative_error is not None and self.reuse != "none"

    def solve_adjoint(
        self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian | None
    ) -> tuple[Array, AdjointReport]:
        """Solve the adjoint equation for the cotangent `g` `(batch, n)`."""
        rtol = default_rtol(backend, g) if self.rtol == "auto" else float(self.rtol)
        if self.max_relative_error is not None:
            return self._to_error(backend, vjp, g, estimate, float(self.max_relative_error))
        u0 = self._start(backend, g, estimate)
        if self.bound is None:
            return self._gmres(backend, vjp, g, u0, rtol)
        return self._driven(backend, vjp, g, backend.xp.zeros_like(g) if u0 is None else u0, rtol, self.bound)

    def _gmres(
        self, backend: Backend, vjp: Map, g: Array, u0: Array | None, rtol: float
    ) -> tuple[Array, AdjointReport]:
        """Solve by GMRES, and directly where GMRES fails."""
        steps, twice = self._steps(g.shape[1]), bool(self.options.get("reorthogonalize", True))
        solve = self._opening(backend, g) if u0 is None else None
        if solve is None:
            solve = partial(gmres, x0=u0, shifted=True)
        found = solve(backend, vjp, g, rtol=rtol, max_steps=steps, reorthogonalize=twice, restart=SPACE)
        ended = backend.xp.where(found.spent, int(Status.MAX_STEPS), int(Status.STALLED))
        size = backend.norm(g)
        u, residual, vjps = self._direct(backend, vjp, g, size, found)
        converged = residual <= rtol * backend.to_accum_dtype(size)
        status = backend.xp.where(converged, int(Status.CONVERGED), ended)
        return u, _reported(backend, g, size, residual, vjps, status)

    def _opening(self, backend: Backend, g: Array) -> Callable[..., LinearSolution] | None:
        """Return the solve that takes plain steps too. With a budget of their own, all vjps are for GMRES."""
        wanted = self.max_steps == "auto" and bool(self.options.get("opening", True))
        if not wanted or g.shape[1] < UNKNOWNS:
            return None
        if backend.capabilities.nested_loops:
            return opened
        if backend.kernels is None or g.shape[1] < MANY:  # without kernels, a sample that returns waits for others
            return None
        norm = backend.norm(g[:, :1])
        return plain_or_gmres if backend.host.numpy_view(norm) is not None and norm.dtype == g.dtype else None

    def _to_error(
        self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian | None, target: float
    ) -> tuple[Array, AdjointReport]:
        """Solve by GMRES to an estimated error, and directly where GMRES fails."""
        xp, size = backend.xp, backend.norm(g)
        norm = backend.to_accum_dtype(size)
        steps = min(self._steps(g.shape[1]), SPACE) if self.max_steps == "auto" else self.max_steps
        found = solve_to_error(backend, vjp, g, estimate, self.reuse, max_relative_error=target, max_vjps=steps)
        before = LinearSolution(found.u, found.residual * norm, found.vjps, found.met, ~found.met)
        u, residual, vjps = self._direct(backend, vjp, g, size, before)
        solved = (vjps > found.vjps) & (residual <= default_rtol(backend, g) * norm)
        status = xp.where(solved, int(Status.CONVERGED), statuses(backend, found))
        error = xp.where(solved, xp.full_like(found.error, float("nan")), found.error)
        return u, _reported(backend, g, size, residual, vjps, status, error)

    def _direct(self, backend: Backend, vjp: Map, g: Array, size: Array, found: LinearSolution) -> Direct:
        """Solve directly where GMRES failed and the budget allows it; keep the solution of GMRES elsewhere."""
        before = Direct(found.x, found.residual, found.products)
        cost = g.shape[1] + 1
        if not 0 < g.shape[1] <= self.direct or (self.max_steps != "auto" and self.max_steps < cost):
            return before
        wanted = ~found.converged & backend.xp.isfinite(size)
        if self.max_steps != "auto":
            wanted = wanted & (found.products + cost <= self.max_steps)
        return solve_direct(backend, vjp, g, wanted, before)

    def _driven(
        self, backend: Backend, vjp: Map, g: Array, u0: Array, rtol: float, solver: Solver
    ) -> tuple[Array, AdjointReport]:
        """Solve with a registered solver."""
        xp = backend.xp
        size = backend.norm(g)
        control = StoppingCriteria(rtol=0.0, atol=rtol * size, max_steps=self._steps(g.shape[1]))
        forward = iterate(backend, solver, lambda u: g + vjp(u), u0, control)
        # Without a solution, u grows until g is lost in the rounding of Jᵀu: a difference of zero proves nothing.
        rounding = backend.cast(backend.eps(forward.z) * backend.norm(forward.z), forward.residual)
        residual = xp.maximum(forward.residual, rounding)
        lost = (forward.status == int(Status.CONVERGED)) & ~(residual <= control.atol)
        status = xp.where(lost, int(Status.STALLED), forward.status)
        return forward.z, _reported(backend, g, size, residual, forward.evaluations, status)

    def _steps(self, n: int) -> int:
        """Return the most steps of the iteration, for systems of n unknowns."""
        if self.max_steps != "auto":
            return self.max_steps
        return MOST_STEPS if self.bound is not None else min(n + MORE_STEPS, MOST_STEPS)

    def _start(self, backend: Backend, g: Array, estimate: InverseJacobian | None) -> Array | None:
        """Return the initial u. None means zero, for which GMRES needs no product."""
        if self.start == "reuse" and estimate is not None:
            known, reused = estimate.known(), -estimate.apply_transpose(g)
            return reused if known is None else backend.select(known, reused, backend.xp.zeros_like(reused))
        zero = self.start == "zero" or (self.start == "auto" and self.solver == "gmres")
        return None if zero else g


def _reported(
    backend: Backend, g: Array, size: Array, residual: Array, vjps: Array, status: Array, error: Array | None = None
) -> AdjointReport:
    """Build the report; a residual that is not finite has its own status."""
    xp = backend.xp
    left = relative(backend, residual, size)
    status = xp.where(xp.isfinite(left), status, int(Status.NONFINITE))
    return report(backend, g, status=xp.astype(status, xp.int32), vjps=vjps, residual=left, error=error)
