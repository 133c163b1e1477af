"""Results of certified reuse on a case, compared with dense reference values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import deqcore
from benchmarks.certificates.problems import Case
from benchmarks.certificates.truth import Truth, gmres_errors, gmres_residuals, truth, vjps_to
from deqcore.backward.broyden_reuse import BroydenReuse
from deqcore.backward.to_error import Reuse
from deqcore.linear.certified import Certified
from deqcore.linear.gmres import gmres
from deqcore.solve.loop import iterate
from deqcore.solvers.broyden import Broyden
from deqcore.types import SolveResult, Status, StoppingCriteria

TARGETS = (0.1, 0.01)
LEVELS = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
MAX_REFINE_VJPS = 60  # the default of the strategy
MOST_VJPS = 100
FORWARD = StoppingCriteria(rtol=1e-4, max_steps=100)
SOLVER = Broyden(history_size=100)  # every pair is kept: a restart would lose most of the estimate


@dataclass(frozen=True)
class Outcome:
    """Certified reuse with one target on one case; arrays `(samples,)`.

    Attributes:
        failed: reported as such.
        settled: the forward solve converged; elsewhere z is not a fixed point.
        vjps: spent.
        baseline: vjps of GMRES from zero to the residual that certified reuse reached.
        sufficient: fewest vjps after which the true error of the same Krylov space's solution is within the target,
            by a textbook GMRES on the dense matrices; NaN where no number of them is enough.
        residual: computed from the dense Jacobian.
        reported_residual: by deqcore.
        error: of u, relative.
        reported_error: the estimate.
        cosine: with the exact u.
    """

    target: float
    failed: Any
    settled: Any
    vjps: Any
    baseline: Any
    sufficient: Any
    residual: Any
    reported_residual: Any
    error: Any
    reported_error: Any
    cosine: Any

    @property
    def excess(self) -> Any:
        """vjps beyond GMRES from zero at the same residual."""
        return self.vjps - self.baseline

    @property
    def ratio(self) -> Any:
        """Estimated over true error."""
        return self.reported_error / self.error

    @property
    def undetected(self) -> Any:
        """Above the target and not reported as failed."""
        return (self.residual > self.target) & ~self.failed

    @property
    def wrong(self) -> Any:
        """True error above the target and not reported as failed, where the forward solve converged."""
        return (self.error > self.target) & ~self.failed & self.settled

    @property
    def certified(self) -> Any:
        """Reported as within the target, where the forward solve converged."""
        return ~self.failed & self.settled


@dataclass(frozen=True)
class Result:
    """One case.

    Attributes:
        case: its name.
        kind: "random cotangents" or "own cotangents".
        samples: with a cotangent that is not zero.
        condition: of I − J, median.
        steps: of the forward solve, median.
        converged: share of the forward solves.
        seen: share of the exact u that lies in the span of the secant pairs' steps, median.
        outcomes: by target.
        alone: the same without the estimate.
        preconditioned: the same with the estimate as a preconditioner, and its Krylov space.
        curve: residual level -> vjps of (preconditioned GMRES, GMRES from zero), each summed over the samples.
    """

    case: str
    kind: str
    samples: int
    condition: float
    steps: float
    converged: float
    seen: float
    outcomes: list[Outcome]
    alone: list[Outcome]
    preconditioned: list[Outcome]
    curve: dict[float, tuple[int, int]] = field(default_factory=dict)


def measure(case: Case) -> Result:
    """Solve, certify, verify."""
    backend = deqcore.get_backend(backend="torch")
    shape = case.z0.shape
    flat = (shape[0], case.z0[0].numel())

    def f(z: Any) -> Any:
        return case.narrow(z.reshape(shape)).reshape(flat)

    with torch.no_grad():
        forward = iterate(backend, SOLVER, f, case.z0.reshape(flat), FORWARD)
    _, vjp = backend.autodiff.linearize(f, forward.z)
    g = case.g.reshape(flat)
    dense = truth(case, forward.z)
    chosen = np.linalg.norm(dense.g, axis=1) > 0
    settled = (forward.status == int(Status.CONVERGED)).numpy()[chosen]
    dense = Truth(*(part[chosen] for part in (dense.a, dense.g, dense.u, dense.condition)))
    steps = max(MOST_VJPS, 2 * MAX_REFINE_VJPS)
    baseline = [gmres_residuals(a, b, steps) for a, b in zip(dense.a, dense.g, strict=True)]
    estimate = SOLVER.secant_estimate(backend, forward.carry.state)
    matrix = _matrix(estimate, g)[chosen]
    with_estimate = [gmres_errors(a, m, b, u) for a, m, b, u in zip(dense.a, matrix, dense.g, dense.u, strict=True)]
    without = [gmres_errors(a, None, b, u) for a, b, u in zip(dense.a, dense.g, dense.u, strict=True)]
    outcomes: dict[Reuse, list[Outcome]] = {"witness": [], "none": [], "precondition": []}
    for target in TARGETS:
        for reuse, found in outcomes.items():
            strategy = BroydenReuse(
                max_relative_error=target, max_refine_vjps=MAX_REFINE_VJPS, fallback="none", reuse=reuse
            )
            u, report = strategy.solve_adjoint(backend, vjp, g, estimate)
            sound = report.status == int(Status.CONVERGED)
            result = Certified(u, report.residual, report.error, report.vjps, sound)
            space = with_estimate if reuse == "precondition" else without
            found.append(_outcome(target, result, dense, baseline, space, chosen, settled))
    curve = {}
    for level in LEVELS:
        result = gmres(
            backend,
            lambda v: v - vjp(v),
            g,
            rtol=level,
            max_steps=MOST_VJPS,
            precondition=lambda v: -estimate.apply_transpose(v),
        )
        curve[level] = (
            int(result.products.numpy()[chosen].sum()),
            sum(vjps_to(residuals, level) for residuals in baseline),
        )
    return Result(
        case.name,
        case.kind,
        int(chosen.sum()),
        float(np.median(dense.condition)),
        float(forward.steps.float().median()),
        float((forward.status == int(Status.CONVERGED)).float().mean()),
        float(np.median(_seen(forward, dense, chosen))),
        outcomes["witness"],
        outcomes["none"],
        outcomes["precondition"],
        curve,
    )


def _outcome(
    target: float, found: Certified, dense: Truth, baseline: list[Any], errors: list[Any], chosen: Any, settled: Any
) -> Outcome:
    wide = found.u.double().numpy()[chosen]
    residual = dense.residual(wide)
    return Outcome(
        target=target,
        failed=~found.met.numpy()[chosen],
        settled=settled,
        vjps=found.vjps.numpy()[chosen],
        baseline=np.array([vjps_to(b, r) for b, r in zip(baseline, residual, strict=True)]),
        sufficient=np.array([float(vjps_to(e, target)) if (e <= target).any() else np.nan for e in errors]),
        residual=residual,
        reported_residual=found.residual.double().numpy()[chosen],
        error=dense.error(wide),
        reported_error=found.error.double().numpy()[chosen],
        cosine=dense.cosine(wide),
    )


def _matrix(estimate: Any, g: Any) -> Any:
    """M = −Hᵀ as matrices `(batch, n, n)`, by its products with unit vectors."""
    columns = [estimate.apply_transpose(row.expand_as(g).contiguous()) for row in torch.eye(g.shape[1], dtype=g.dtype)]
    return -torch.stack(columns, 2).double().numpy()


def _seen(forward: SolveResult, dense: Truth, chosen: Any) -> list[float]:
    """‖Q Qᵀ u‖ / ‖u‖ with Q the space of the residuals, in which all steps of Broyden's method lie."""
    vectors = forward.carry.state.basis.vectors().double().numpy()[chosen]
    result = []
    for basis, u in zip(vectors, dense.u, strict=True):
        q = np.linalg.svd(basis[np.linalg.norm(basis, axis=1) > 0], full_matrices=False)[2]
        result.append(float(np.linalg.norm(q @ u) / np.linalg.norm(u)))
    return result
