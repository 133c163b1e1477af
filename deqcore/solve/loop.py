"""The loop: the common part of all solvers, so that a solver is only its step.

It owns tolerances, freezing, the best iterate, status and counters, and keeps these promises:

- A sample stops changing (iterate, state and estimate) at the first iterate that meets the tolerance, so its result
  does not depend on the rest of the batch, and a late check on a slow device does no harm.
- NaN or inf in one sample does not affect another. A step to a point where f is not finite is refused and shortened,
  and the best finite iterate is returned.
- The residual is the true one, ‖f(z) − z‖, for any step of the solver.

Where reading a sample's figures costs no wait, `deqcore.solve.host` decides on the host; `deqcore.solve.device` is for
devices and traced code, and `deqcore.solve.coupled` for units that f couples.

Termination follows the practice of NonlinearSolve.jl (relative and absolute residual, best iterate, blow-up and
stall detection with separate statuses), per sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.solver import Solver
from deqcore.linear.norms import residual_norms
from deqcore.solve.device import DeviceLoop
from deqcore.solve.host import HostLoop, on_host, read, written
from deqcore.solve.step import copy_state, finalized, merge
from deqcore.solve.termination import goal, greater, judged
from deqcore.types import Array, Limits, LoopState, Map, SolveResult, Status, StoppingCriteria

if TYPE_CHECKING:
    from deqcore.solve.compaction import RestrictRows

ROUNDING = 8.0  # two evaluations of f at the same z differ by at most this many units of rounding


def iterate(
    backend: Backend,
    solver: Solver,
    f: Map,
    z0: Array,
    control: StoppingCriteria,
    resume: LoopState | None = None,
    narrow: RestrictRows | None = None,
) -> SolveResult:
    """Run `solver` on `f` from `z0` `(batch, n)` until every sample has stopped.

    Args:
        backend: the backend of these arrays.
        solver: the method.
        f: the map on `(batch, n)`.
        z0: initial iterate; ignored with `resume`.
        control: the stopping criteria.
        resume: the loop state of an earlier solve to continue: with its solver state if f is the same, otherwise from
            its best iterate.
        narrow: restricts f to some rows of the batch; samples that have stopped are then no longer evaluated.

    Returns:
        The best iterate of each sample, with its status and figures.
    """
    like = z0 if resume is None else resume.z
    limits = Limits.of(backend.xp, backend.eps(like), control.rtol, control.atol, control.patience)
    fresh = resume is None and control.units == 1 and backend.capabilities.nested_loops
    opening = solver.opening() if fresh else None
    if resume is None:
        start = _begin(backend, solver if opening is None else opening, f, z0, limits)
    else:
        start = _resume(backend, solver, f, resume, limits)
    if opening is None:
        end = _advanced(backend, solver, f, start, limits, control, narrow)
    else:
        loop = DeviceLoop(backend, solver, f, limits)
        end = loop.ended(start, loop.opened(opening, written(backend, start), control.max_steps, control.check_every))
    end = end._replace(state=finalized(end.state))
    evaluations = solver.evaluations(backend, end.steps, end.state)
    if resume is not None:
        evaluations = evaluations + end.extra
    return SolveResult(end.best_z, end.best_fz, end.best_residual, end.status, end.steps, evaluations, end)


def _advanced(
    backend: Backend,
    solver: Solver,
    f: Map,
    start: LoopState,
    limits: Limits,
    control: StoppingCriteria,
    narrow: RestrictRows | None,
) -> LoopState:
    """Return the loop state after all samples have stopped or spent their budget."""
    if control.units > 1:
        from deqcore.solve.coupled import CoupledLoop

        coupled = CoupledLoop(backend, solver, f, limits, control.units)
        start = coupled.begun(written(backend, start))
        return coupled.ended(start, coupled.run(start, control.max_steps, control.check_every))

    def loop_of(f: Map, carry: LoopState, spare: int) -> HostLoop | DeviceLoop:
        host = read(backend, carry) is not None
        return (HostLoop if host else DeviceLoop)(backend, solver, f, limits, spare)

    def advance(f: Map, carry: LoopState, steps: int, spare: int) -> LoopState:
        return loop_of(f, carry, spare).run(carry, steps, control.check_every)

    loop = loop_of(f, start, 0)
    if narrow is None:
        end = loop.run(start, control.max_steps, control.check_every)
    else:
        from deqcore.solve.compaction import solve_compacted

        start = written(backend, start)
        end = solve_compacted(backend, advance, f, narrow, start, int(control.max_steps))
    return loop.ended(start, end)


@dataclass(frozen=True)
class BoundSolve:
    """`iterate` with everything bound but f and z0, for a backend.

    A tracing backend compiles for the solver, and takes the numbers in `control` and `resume` as data.
    """

    backend: Backend
    solver: Solver
    control: StoppingCriteria
    resume: LoopState | None = None
    narrow: RestrictRows | None = None

    def __call__(self, f: Map, z0: Array) -> SolveResult:
        """Solve for `f` from `z0` `(batch, n)`."""
        return iterate(self.backend, self.solver, f, z0, self.control, self.resume, self.narrow)


def _begin(backend: Backend, solver: Solver, f: Map, z0: Array, limits: Limits) -> LoopState:
    fz = f(z0)
    return _begin_at(backend, z0, fz, limits)._replace(state=solver.init(backend, z0, fz))


def _begin_at(backend: Backend, z0: Array, fz: Array, limits: Limits) -> LoopState:
    """Return the loop state before the first step, without the solver's state.

    Its figures are NumPy arrays if reading them costs no wait, see `deqcore.solve.host.written`.
    """
    fused = None if backend.kernels is None else backend.kernels.first_figures(z0, fz, limits)
    if fused is not None:
        return LoopState(z0, fz, None, best_z=z0, best_fz=fz, **fused)
    norms = *residual_norms(backend, z0, fz), backend.norm(z0)
    views = [backend.host.numpy_view(norm) for norm in norms]
    if any(view is None for view in views):
        return LoopState(z0, fz, None, best_z=z0, best_fz=fz, **first_figures(backend.xp, limits, *norms))
    with np.errstate(all="ignore"):  # a residual may be NaN or inf
        figures = first_figures(np, on_host(backend, limits), *views)
    return LoopState(z0, fz, None, best_z=z0, best_fz=fz, **figures)


def first_figures(xp: Any, limits: Limits, residual: Any, size: Any, start: Any) -> dict[str, Any]:
    """Return the figures of the loop state before the first step, from ‖f(z0) − z0‖, ‖f(z0)‖ and ‖z0‖ `(batch,)`."""
    reference = greater(xp, start, size)
    finite = xp.isfinite(residual)
    met = residual <= goal(xp, limits, size, reference)
    status = xp.where(finite, xp.astype(met, xp.int32) * int(Status.CONVERGED), int(Status.NONFINITE))
    none = xp.zeros_like(status)
    mark = xp.where(finite, residual, float("inf"))
    return {
        "status": status,
        "steps": none,
        "best_residual": mark,
        "reference": reference,
        "peak": residual,
        "mark": mark,
        "since": none,
        "length": xp.full_like(residual, 0.5),
        "tried": xp.full_like(residual, float("inf")),
        "extra": none,
    }


def _resume(backend: Backend, solver: Solver, f: Map, old: LoopState, limits: Limits) -> LoopState:
    """Continue from the best iterates: one evaluation of f gives their residuals and shows whether f has changed.

    Samples whose f is the same continue, on copies of their histories, if they do not meet the (perhaps new) tolerance.
    The others begin again at their best iterate, because their histories and residuals belong to another function.
    So do samples that have failed.
    """
    xp = backend.xp
    z = old.best_z
    first = written(backend, _begin_at(backend, z, f(z), limits))
    near = ROUNDING * backend.guards.output_eps(z) * (backend.norm(z) + backend.norm(old.best_fz))
    same = backend.norm(first.fz - old.best_fz) <= near  # False for NaN, too
    failed = (old.status == int(Status.NONFINITE)) | (old.status == int(Status.DIVERGED))
    # The history of a failed sample led away. A sample whose budget ended during shorter steps has not failed yet.
    same = same & ~(failed & (old.since >= 0))
    reference, peak = xp.where(same, old.reference, first.reference), xp.where(same, old.peak, first.peak)
    size = backend.norm(first.fz)
    # The last mark of a sample that has converged is this very residual, which was below the one before.
    done = same & (old.status == int(Status.CONVERGED))
    mark = xp.where(done, xp.full_like(first.mark, float("inf")), xp.where(same, old.mark, first.mark))
    met, _ = judged(xp, limits, first.best_residual, size, reference, peak, mark)
    goes_on = xp.where(met, xp.full_like(old.status, int(Status.CONVERGED)), xp.zeros_like(old.status))
    carry = first._replace(
        z=old.z,
        fz=old.fz,
        state=copy_state(old.state),
        status=xp.where(same, goes_on, first.status),
        steps=old.steps,
        reference=reference,
        peak=peak,
        since=xp.where(same & (old.since < 0), old.since, first.since),
        length=xp.where(same, old.length, first.length),
        tried=xp.where(same, old.tried, first.tried),
        extra=old.extra + 1,
    )

    def renewed(carry: LoopState) -> LoopState:
        state = merge(backend, ~same, solver.init(backend, z, first.fz), carry.state)
        before, after = (solver.evaluations(backend, old.steps, solver_state) for solver_state in (carry.state, state))
        return carry._replace(
            z=backend.select(same, carry.z, z),
            fz=backend.select(same, carry.fz, first.fz),
            state=state,
            extra=carry.extra + before - after,  # a solver that counts in its state has begun to count again
        )

    return backend.cond(~same, renewed, carry)
