"""The loop: the common part of all solvers, so that a solver is only its step.

It owns tolerances, freezing, the best iterate, status and counters, and keeps these promises:

- A sample stops changing (iterate, state and estimate) at the first iterate that meets the tolerance, so its result
  does not depend on the rest of the batch, and a late check on a slow device does no harm.
- NaN or inf in one sample does not affect another. A step to a point where f is not finite is refused and shortened,
  and the best finite iterate is returned.
- The residual is the true one, ‖f(z) − z‖, for any step of the solver.

Termination follows the practice of NonlinearSolve.jl (relative and absolute residual, best iterate, blow-up and
stall detection with separate statuses), per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.solver import Solver, map_state, map_states
from deqcore.errors import PluginError
from deqcore.linear.norms import residual_norms
from deqcore.solve.compaction import RestrictRows, solve_compacted
from deqcore.solve.termination import (
    PENDING,
    PROGRESS,
    REFUSED,
    SHORTER,
    SHORTEST,
    Verdict,
    goal,
    greater,
    judged,
    spent,
    verdict,
)
from deqcore.types import Array, Limits, LoopState, Map, Path, SolveResult, Status, StepResult, StoppingCriteria

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
    start = _begin(backend, solver, f, z0, limits) if resume is None else _resume(backend, solver, f, resume, limits)
    refusals = _Refusals(backend, solver)

    def going(carry: LoopState) -> Array | bool:
        status = backend.host.numpy_view(carry.status)
        if status is None:
            return backend.xp.any(carry.status == int(Status.RUNNING))
        return bool((status == int(Status.RUNNING)).any())

    def advance(
        f: Map, running: Callable[[LoopState], Array | bool], carry: LoopState, steps: int | Array
    ) -> LoopState:
        def body(carry: LoopState) -> LoopState:
            return refusals.after(_step(backend, solver, f, refusals.before(carry), limits))

        return backend.loop(refusals.watched(running), body, carry, steps, control.check_every)

    if narrow is None:
        end = advance(f, going, start, control.max_steps)
    else:
        end = solve_compacted(backend, advance, f, narrow, start, int(control.max_steps))
    status = _ended(backend, start, end)
    end = end._replace(status=status, state=finalized(end.state))
    evaluations = solver.evaluations(backend, end.steps, end.state)
    if resume is not None:
        evaluations = evaluations + end.extra
    return SolveResult(end.best_z, end.best_fz, end.best_residual, status, end.steps, evaluations, end)


def _ended(backend: Backend, start: LoopState, end: LoopState) -> Array:
    """Return the statuses of a loop that is over: a sample that still runs has spent its budget."""
    host_status = backend.host.numpy_view(end.status)
    if host_status is not None and not (host_status == int(Status.RUNNING)).any():
        return end.status
    residual, size = residual_norms(backend, end.z, end.fz)
    left = spent(backend.xp, residual, size, end.path, end.steps - start.steps)
    return backend.xp.where(end.status == int(Status.RUNNING), left, end.status)


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
    """Return the loop state before the first step, without the solver's state."""
    xp = backend.xp
    residual, size = residual_norms(backend, z0, fz)
    reference = greater(xp, backend.norm(z0), size)
    finite = xp.isfinite(residual)
    status = xp.zeros_like(residual, dtype=xp.int32)
    met = residual <= goal(xp, limits, size, reference)
    status = xp.where(met, status + int(Status.CONVERGED), status)
    status = xp.where(finite, status, xp.full_like(status, int(Status.NONFINITE)))
    finite_residual = xp.where(finite, residual, xp.full_like(residual, float("inf")))
    return LoopState(
        z=z0,
        fz=fz,
        state=None,
        status=status,
        steps=xp.zeros_like(status),
        best_z=z0,
        best_fz=fz,
        best_residual=finite_residual,
        reference=reference,
        peak=residual,
        mark=finite_residual,
        since=xp.zeros_like(status),
        length=xp.full_like(residual, 0.5),
        tried=xp.full_like(residual, float("inf")),
        extra=xp.zeros_like(status),
    )


def _resume(backend: Backend, solver: Solver, f: Map, old: LoopState, limits: Limits) -> LoopState:
    """Continue from the best iterates: one evaluation of f gives their residuals and shows whether f has changed.

    Samples whose f is the same continue, on copies of their histories, if they do not meet the (perhaps new) tolerance.
    The others begin again at their best iterate, because their histories and residuals belong to another function.
    So do samples that have failed.
    """
    xp = backend.xp
    z = old.best_z
    first = _begin_at(backend, z, f(z), limits)
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


def fused_step(backend: Backend, solver: Solver, f: Map, z: Array, fz: Array, state: Any) -> StepResult | None:
    """Return the step of `solver` by a fused kernel, or None if the backend has none for it."""
    return None if backend.kernels is None else backend.kernels.step(solver, f, z, fz, state)


def _step(backend: Backend, solver: Solver, f: Map, carry: LoopState, limits: Limits) -> LoopState:
    before = backend.host.numpy_view(carry.status)
    everyone = before is not None and bool((before == int(Status.RUNNING)).all())
    active = None if everyone else carry.status == int(Status.RUNNING)
    start = carry.z, carry.fz, masked(carry.state, active)
    result = fused_step(backend, solver, f, *start)
    if result is None:
        result = _check_step(solver, solver.step(backend, f, *start), carry.z)
    z, fz, state, size, frozen = result
    residual = solver.residual_norm(backend, state)
    if residual is None:
        residual, size = residual_norms(backend, z, fz)
    if size is None and limits.relative:
        size = backend.norm(fz)
    if active is not None and not frozen:
        state = freeze(backend, active, state, carry.state)
    updated = None if backend.kernels is None else backend.kernels.update(carry, result, residual, size, limits)
    if updated is not None:
        return updated._replace(state=state)
    if active is None and _all_progressing(backend, residual, size, carry, limits):
        zeros = carry.status  # RUNNING is 0
        return carry._replace(
            z=z, fz=fz, state=state, steps=carry.steps + 1, best_z=z, best_fz=fz, best_residual=residual,
            mark=residual, since=zeros,
        )  # fmt: skip

    better, status, since, mark, peak = _update_status(backend, residual, size, fz, carry, limits)
    if active is not None:
        better = better & active
        z = backend.select(active, z, carry.z)
        fz = backend.select(active, fz, carry.fz)
        status = backend.xp.where(active, status, carry.status)
    steps = carry.steps + 1 if active is None else carry.steps + backend.xp.astype(active, backend.xp.int32)
    if backend.known_all(better):
        best = z, fz, residual
    else:
        best = (
            backend.select(better, z, carry.best_z),
            backend.select(better, fz, carry.best_fz),
            backend.xp.where(better, residual, carry.best_residual),
        )
    return LoopState(
        z, fz, state, status, steps, *best, carry.reference, peak, mark, since, carry.length, carry.tried, carry.extra
    )


def _check_step(solver: Solver, result: Any, z: Array) -> StepResult:
    """Return the result of a step, after a check that it keeps the contract."""
    if isinstance(result, tuple) and [getattr(part, "shape", None) for part in result[:-1]] == [z.shape] * 2:
        return StepResult(*result)
    expected = f"(z, f(z), state) with two arrays of shape {tuple(z.shape)}"
    raise PluginError.returned(f"{type(solver).__name__}.step", result, expected)


def _all_progressing(backend: Backend, residual: Array, size: Array | None, carry: LoopState, limits: Limits) -> bool:
    """Return whether every sample is known to progress and none to be done, as in most steps of most solves.

    Then no verdict and no selection is needed. The best residual is at most the mark and the peak.
    """
    now, best, reference = (
        backend.host.numpy_view(figure) for figure in (residual, carry.best_residual, carry.reference)
    )
    length = None if size is None else backend.host.numpy_view(size)
    if now is None or best is None or reference is None or (size is not None and length is None):
        return False
    with np.errstate(all="ignore"):  # atol + rtol‖f(z)‖ may leave the range
        target = goal(np, _on_host(backend, limits), length, reference)
        return bool(((now < PROGRESS * best) & (now > target)).all())


def _update_status(
    backend: Backend, residual: Array, size: Array | None, fz: Array, carry: LoopState, limits: Limits
) -> Verdict:
    """Return the verdict on the residual, computed on the host if reading it costs no wait."""
    size = backend.norm(fz) if size is None else size
    views = [backend.host.numpy_view(figure) for figure in (residual, size, *carry.path)]
    if any(view is None for view in views):
        return verdict(backend.xp, limits, residual, size, carry.path)
    now, length, *path = views
    with np.errstate(all="ignore"):  # a residual may be NaN or inf
        found = verdict(np, _on_host(backend, limits), now, length, Path(*path))
    return Verdict(*map(backend.host.from_numpy_view, found))


def _on_host(backend: Backend, limits: Limits) -> Limits:
    """Return the limits with NumPy views of their arrays, for a solve on the host."""
    if isinstance(limits.rtol, float) and isinstance(limits.atol, float):
        return limits
    views = (
        limit if isinstance(limit, float) else backend.host.numpy_view(limit)
        for limit in (limits.rtol, limits.atol, limits.slack)
    )
    rtol, atol, slack = views
    return limits._replace(rtol=rtol, atol=atol, slack=slack)


class _Refusals:
    """Handling of steps to points where f is not finite: the sample tries a shorter step from its best iterate.

    Steps with finite residuals need no work and no wait for a device. If reading costs no wait, refused steps are known
    after each step. On other devices they are read together with the check whether all samples have stopped; until
    then the sample takes no step that counts. Traced code checks in the loop itself.
    """

    def __init__(self, backend: Backend, solver: Solver) -> None:
        self.backend = backend
        self.solver = solver
        self.pending = False
        self.waits = backend.capabilities.eager and backend.capabilities.accelerator

    def watched(self, running: Callable[[LoopState], Array | bool]) -> Callable[[LoopState], Array | bool]:
        """Wrap `running` so that on a device the same wait also reads whether steps were refused."""
        backend, xp = self.backend, self.backend.xp

        def asked(carry: LoopState) -> Array | bool:
            going = running(carry)
            if not self.waits or isinstance(going, bool) or backend.host.numpy_view(carry.since) is not None:
                return going
            both = 2 * xp.astype(going, xp.int32) + xp.astype(xp.any(self._rows(carry)), xp.int32)
            answer = int(backend.to_numpy(both))
            self.pending = answer % 2 == 1
            return answer >= 2

        return asked

    def before(self, carry: LoopState) -> LoopState:
        """Return the loop state before a step, with refused steps shortened if a check has found any."""
        if not self.pending:
            return carry
        self.pending = False
        return self.shortened(carry)

    def after(self, carry: LoopState) -> LoopState:
        """Return the loop state after a step, with refused steps shortened."""
        since = self.backend.host.numpy_view(carry.since)
        if since is None and not self.waits:
            shortened: LoopState = self.backend.cond(self._rows(carry), self.shortened, carry)
            return shortened
        if since is None or not (since == REFUSED).any():
            return carry
        return self.shortened(carry)

    def _rows(self, carry: LoopState) -> Array:
        return (carry.status == int(Status.RUNNING)) & (carry.since == REFUSED)

    def shortened(self, carry: LoopState) -> LoopState:
        """Move samples with a refused step to the point to try next, with a residual of 0 and a reset solver state.

        Every solver then evaluates f at exactly this point, see `Solver.restarted`.
        """
        backend, xp = self.backend, self.backend.xp
        rows = self._rows(carry)
        stuck = rows & ~(carry.best_residual < PROGRESS * carry.tried)
        length = xp.where(stuck, SHORTER * carry.length, carry.length)
        lost = rows & (length < SHORTEST)
        rows = rows & ~lost
        part = backend.cast(length, carry.z)[:, None]
        point = carry.best_z + part * (carry.best_fz - carry.best_z)
        z = backend.select(rows, point, carry.z)
        return carry._replace(
            z=z,
            fz=backend.select(rows, point, carry.fz),
            state=self.solver.restarted(backend, rows, z, carry.state),
            status=xp.where(lost, xp.full_like(carry.status, int(Status.NONFINITE)), carry.status),
            since=xp.where(
                rows, xp.full_like(carry.since, PENDING), xp.where(lost, xp.zeros_like(carry.since), carry.since)
            ),
            length=length,
            tried=xp.where(rows, carry.best_residual, carry.tried),
        )


def masked(state: Any, active: Array | None) -> Any:
    """Return the same solver state with `active` set in each of its histories."""
    return map_state(state, lambda leaf: leaf.masked(active) if isinstance(leaf, History) else leaf)


def finalized(state: Any) -> Any:
    """Return the solver state to keep after the solve."""
    return map_state(state, lambda leaf: leaf.finalized() if isinstance(leaf, History) else leaf)


def copy_state(state: Any) -> Any:
    """Return the same solver state with copies of its histories."""
    return map_state(state, lambda leaf: leaf.copy() if isinstance(leaf, History) else leaf)


def merge(backend: Backend, rows: Array, new: Any, old: Any) -> Any:
    """Return the solver state `new` in the samples `rows` `(batch,)`, `old` elsewhere; None means a scale of 1."""

    def leaf(new: Any, old: Any) -> Any:
        if isinstance(new, History):
            return old.merge(rows, new)
        if new is None or old is None:
            if new is old:
                return None
            one = backend.xp.ones_like(old if new is None else new)
            new, old = one if new is None else new, one if old is None else old
        if new.ndim:
            return backend.select(rows, new, old)
        return backend.xp.where(backend.xp.all(rows), new, old)

    return map_states(leaf, new, old)


def freeze(backend: Backend, active: Array, new: Any, old: Any) -> Any:
    """Keep the rows of `old` where not active. Histories do so themselves; leaves without a batch axis pass."""

    def leaf(new: Any, old: Any) -> Any:
        kept = new is None or isinstance(new, History) or not new.ndim
        return new if kept else backend.select(active, new, old)

    return map_states(leaf, new, old)
