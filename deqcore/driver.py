"""The driver: everything that all solvers share, so that a solver is only its step.

It owns tolerances, freezing, the best iterate, status and counters, and keeps these promises:

- A sample stops changing (iterate, state and estimate) at the first iterate that meets the tolerance, so its result
  does not depend on its batch mates, and a late check on a slow device does no harm.
- NaN or inf in one sample touches no other; the best finite iterate is returned.
- The residual is the true one, ‖f(z) − z‖, whatever step the solver took.

Termination follows the practice of NonlinearSolve.jl (relative and absolute residual, best iterate, blow-up and
stall detection with separate statuses), per sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deqcore.backend import Array, Backend, History, Map, Stepped
from deqcore.compaction import Narrow, shrinking
from deqcore.errors import PluginError
from deqcore.solution import Status
from deqcore.solver import Solver, map_state

BLOW_UP = 1e6  # a residual this many times the first one counts as divergence
ROUNDING = 8.0  # two evaluations of one f at one z differ by this many units of rounding at most
PROGRESS = 0.999  # a residual must fall below this part of the last mark within `patience` steps


class Control(NamedTuple):
    """When to stop. Numbers may be framework scalars: changing them then recompiles nothing.

    Attributes:
        rtol: a sample is done when ‖f(z) − z‖ ≤ atol + rtol·‖f(z)‖.
        atol: see rtol.
        max_steps: step budget; 0 evaluates f once and reports.
        check_every: steps between host checks, or "auto".
        patience: steps without progress after which a sample counts as stalled.
    """

    rtol: float | Array
    atol: float | Array = 0.0
    max_steps: int | Array = 40
    check_every: int | str = "auto"
    patience: int = 50


class Carry(NamedTuple):
    """The loop state. All arrays have the batch as their first axis."""

    z: Array
    fz: Array
    state: Any
    status: Array
    steps: Array
    best_z: Array
    best_fz: Array
    best_residual: Array
    limit: Array  # blow-up limit
    mark: Array  # residual at the last progress
    since: Array  # steps since then
    extra: Array  # evaluations of f beyond those that the solver counts: one for each time that the solve went on


class Forward(NamedTuple):
    """What a solve found, raveled: `z`, `fz` are `(batch, n)`, the rest `(batch,)`.

    A strategy that takes a fixed number of steps leaves no carry, and f(z) only where it evaluated it.
    """

    z: Array
    fz: Any
    residual: Array
    status: Array
    steps: Array
    evaluations: Array
    carry: Any


def drive(
    backend: Backend,
    solver: Solver,
    f: Map,
    z0: Array,
    control: Control,
    resume: Carry | None = None,
    narrow: Narrow | None = None,
) -> Forward:
    """Run `solver` on `f` from `z0` `(batch, n)` until every sample has stopped.

    Args:
        backend: whose arrays these are.
        solver: the method.
        f: the map on `(batch, n)`.
        z0: initial iterate; ignored with `resume`.
        control: when to stop.
        resume: the carry of an earlier solve, to go on from: of the same f with all that it has learned, of another
            one from its best iterate.
        narrow: gives f for some rows of the batch; with it, samples that have stopped are no longer evaluated.

    Returns:
        The best iterate of each sample, and how it ended.
    """
    tolerance = _Tolerance(backend, control)
    if resume is None:
        start = _begin(backend, solver, f, z0, tolerance)
    else:
        start = _reopen(backend, solver, f, resume, tolerance)

    def going(carry: Carry) -> Array | bool:
        seen = backend.host(carry.status)
        if seen is None:
            return backend.xp.any(carry.status == int(Status.RUNNING))
        return bool((seen == int(Status.RUNNING)).any())

    def advance(f: Map, running: Callable[[Carry], Array | bool], carry: Carry, steps: int | Array) -> Carry:
        def body(carry: Carry) -> Carry:
            return _step(backend, solver, f, carry, tolerance, control.patience)

        return backend.loop(running, body, carry, steps, control.check_every)

    if narrow is None:
        end = advance(f, going, start, control.max_steps)
    else:
        end = shrinking(backend, advance, f, narrow, start, int(control.max_steps))
    xp = backend.xp
    spent = xp.full_like(end.status, int(Status.MAX_STEPS))
    status = xp.where(end.status == int(Status.RUNNING), spent, end.status)
    end = end._replace(status=status, state=settled(end.state))
    evaluations = solver.evaluations(backend, end.steps, end.state)
    if resume is not None:
        evaluations = evaluations + end.extra
    return Forward(end.best_z, end.best_fz, end.best_residual, status, end.steps, evaluations, end)


@dataclass(frozen=True)
class Drive:
    """`drive` with everything bound but f and z0: what a backend solves with.

    A tracing backend compiles for the solver, and takes the numbers in `control` and `resume` as data.
    """

    backend: Backend
    solver: Solver
    control: Control
    resume: Carry | None = None
    narrow: Narrow | None = None

    def __call__(self, f: Map, z0: Array) -> Forward:
        """Solve for `f` from `z0` `(batch, n)`."""
        return drive(self.backend, self.solver, f, z0, self.control, self.resume, self.narrow)


def tolerance_met(backend: Backend, control: Control, residual: Array, fz: Array) -> Array:
    """Whether residuals `(batch,)` meet the tolerance for f(z) `(batch, n)`: `(batch,)` of bool."""
    return _Tolerance(backend, control).met(residual, fz)


class _Tolerance:
    """Decides whether residuals `(batch,)` are small enough."""

    def __init__(self, backend: Backend, control: Control) -> None:
        self.backend = backend
        self.rtol = control.rtol
        self.atol = control.atol

    def met(self, residual: Array, fz: Array) -> Array:
        return residual <= self.goal(fz)

    def goal(self, fz: Array, size: Array | None = None) -> Array | float:
        """Largest residual that is small enough: `(batch,)`, or one number for all. `size` is ‖f(z)‖ if known."""
        if isinstance(self.rtol, float) and self.rtol == 0.0 and isinstance(self.atol, float):
            return self.atol
        relative = self.rtol * (self.backend.norm(fz) if size is None else size)
        return relative if isinstance(self.atol, float) and self.atol == 0.0 else self.atol + relative


def _begin(backend: Backend, solver: Solver, f: Map, z0: Array, tolerance: _Tolerance) -> Carry:
    fz = f(z0)
    return _begin_at(backend, z0, fz, tolerance)._replace(state=solver.init(backend, z0, fz))


def _begin_at(backend: Backend, z0: Array, fz: Array, tolerance: _Tolerance) -> Carry:
    """The carry before the first step, but for the solver's state."""
    xp = backend.xp
    residual = backend.norm(fz - z0)
    finite = xp.isfinite(residual)
    status = xp.zeros_like(residual, dtype=xp.int32)
    status = xp.where(tolerance.met(residual, fz), status + int(Status.CONVERGED), status)
    status = xp.where(finite, status, xp.full_like(status, int(Status.NONFINITE)))
    known = xp.where(finite, residual, xp.full_like(residual, float("inf")))
    return Carry(
        z=z0,
        fz=fz,
        state=None,
        status=status,
        steps=xp.zeros_like(status),
        best_z=z0,
        best_fz=fz,
        best_residual=known,
        limit=xp.clip(BLOW_UP * residual, max=float(xp.finfo(residual.dtype).max)),  # inf is never sane
        mark=known,
        since=xp.zeros_like(status),
        extra=xp.zeros_like(status),
    )


def _reopen(backend: Backend, solver: Solver, f: Map, old: Carry, tolerance: _Tolerance) -> Carry:
    """Go on from the best iterates: one evaluation of f says where they stand, and whether f is still the same.

    Samples whose f is the same run on, on copies of their histories, if they do not meet the (perhaps new) tolerance.
    The others begin again at their best iterate: what was learned, and every residual, is that of another function.
    So do samples that have failed.
    """
    xp = backend.xp
    z = old.best_z
    first = _begin_at(backend, z, f(z), tolerance)
    near = ROUNDING * backend.precision(z) * (backend.norm(z) + backend.norm(old.best_fz))
    same = backend.norm(first.fz - old.best_fz) <= near  # False for NaN, too
    failed = (old.status == int(Status.NONFINITE)) | (old.status == int(Status.DIVERGED))
    same = same & ~failed  # what a failed sample has learned led away
    carry = first._replace(
        z=old.z,
        fz=old.fz,
        state=copy_state(old.state),
        steps=old.steps,
        limit=xp.where(same, old.limit, first.limit),
        extra=old.extra + 1,
    )

    def renewed(carry: Carry) -> Carry:
        state = merge(backend, ~same, solver.init(backend, z, first.fz), carry.state)
        before, after = (solver.evaluations(backend, old.steps, each) for each in (carry.state, state))
        return carry._replace(
            z=backend.select(same, carry.z, z),
            fz=backend.select(same, carry.fz, first.fz),
            state=state,
            extra=carry.extra + before - after,  # a solver that counts in its state has begun to count again
        )

    return backend.once(~same, renewed, carry)


def _step(backend: Backend, solver: Solver, f: Map, carry: Carry, tolerance: _Tolerance, patience: int) -> Carry:
    before = backend.host(carry.status)
    everyone = before is not None and bool((before == int(Status.RUNNING)).all())
    active = None if everyone else carry.status == int(Status.RUNNING)
    start = carry.z, carry.fz, with_active(carry.state, active)
    found = backend.native_step(solver, f, *start) or _stepped(solver, solver.step(backend, f, *start), carry.z)
    z, fz, state, size, frozen = found
    residual = solver.residual_norm(backend, state)
    if residual is None:
        residual, size = backend.measure(z, fz)
    goal = tolerance.goal(fz, size)
    if active is not None and not frozen:
        state = freeze(backend, active, state, carry.state)
    kept: Carry | None = backend.native_keep(carry, found, residual, goal, patience)
    if kept is not None:
        return kept._replace(state=state)
    if active is None and _calm(backend, residual, goal, carry):
        zeros = carry.status  # RUNNING is 0
        return Carry(z, fz, state, zeros, carry.steps + 1, z, fz, residual, carry.limit, residual, zeros, carry.extra)

    better, status, since, mark = _judge(backend, residual, goal, carry, patience)
    if active is not None:
        better = better & active
        z = backend.select(active, z, carry.z)
        fz = backend.select(active, fz, carry.fz)
        status = backend.xp.where(active, status, carry.status)
    steps = carry.steps + 1 if active is None else carry.steps + backend.xp.astype(active, backend.xp.int32)
    if backend.all_known(better):
        best = z, fz, residual
    else:
        best = (
            backend.select(better, z, carry.best_z),
            backend.select(better, fz, carry.best_fz),
            backend.xp.where(better, residual, carry.best_residual),
        )
    return Carry(z, fz, state, status, steps, *best, carry.limit, mark, since, carry.extra)


def _stepped(solver: Solver, found: Any, z: Array) -> Stepped:
    """What a step returned, if it is what the contract says."""
    if isinstance(found, tuple) and [getattr(each, "shape", None) for each in found[:-1]] == [z.shape] * 2:
        return Stepped(*found)
    expected = f"(z, f(z), state) with two arrays of shape {tuple(z.shape)}"
    raise PluginError.returned(f"{type(solver).__name__}.step", found, expected)


def _calm(backend: Backend, residual: Array, goal: Array | float, carry: Carry) -> bool:
    """Whether every sample is known to have progressed, and none to be done: most steps of most solves.

    Then nothing is to be judged or selected. The best residual is at most the mark and within the blow-up limit.
    """
    now, best = backend.host(residual), backend.host(carry.best_residual)
    if now is None or best is None:
        return False
    target = goal if isinstance(goal, float) else backend.host(goal)
    return bool(((now < PROGRESS * best) & (now > target)).all())


def _judge(
    backend: Backend, residual: Array, goal: Array | float, carry: Carry, patience: int
) -> tuple[Array, Array, Array, Array]:
    """Which iterates are the best so far, and the new status, steps without progress, and mark of each sample."""
    arrays = [residual, carry.limit, carry.best_residual, carry.mark, carry.since]
    target = goal if isinstance(goal, float) else backend.host(goal)
    seen = [backend.host(a) for a in arrays]
    if target is None or any(view is None for view in seen):
        return _verdict(backend.xp, patience, goal, *arrays)
    better, status, since, mark = (backend.from_host(a) for a in _verdict(np, patience, target, *seen))
    return better, status, since, mark


def _verdict(
    xp: Any, patience: int, goal: Any, residual: Any, limit: Any, best: Any, mark: Any, since: Any
) -> tuple[Any, Any, Any, Any]:
    met = residual <= goal
    sane = residual <= limit  # False for NaN, too
    better = (residual < best) | (met & sane)
    progress = residual < PROGRESS * mark
    since = xp.where(progress, xp.zeros_like(since), since + 1)
    status = xp.astype(met, xp.int32) * int(Status.CONVERGED)
    status = xp.where(met | (since < patience), status, xp.full_like(status, int(Status.STALLED)))
    status = xp.where(sane, status, xp.full_like(status, int(Status.DIVERGED)))
    status = xp.where(xp.isfinite(residual), status, xp.full_like(status, int(Status.NONFINITE)))
    return better, status, since, xp.where(progress, residual, mark)


def with_active(state: Any, active: Array | None) -> Any:
    """The same solver state with `active` set in each of its histories."""
    return map_state(state, lambda leaf: leaf.with_active(active) if isinstance(leaf, History) else leaf)


def settled(state: Any) -> Any:
    """The solver state as it is kept after the solve."""
    return map_state(state, lambda leaf: leaf.settled() if isinstance(leaf, History) else leaf)


def copy_state(state: Any) -> Any:
    """The same solver state with histories of its own."""
    return map_state(state, lambda leaf: leaf.copy() if isinstance(leaf, History) else leaf)


def merge(backend: Backend, rows: Array, new: Any, old: Any) -> Any:
    """The solver state `new` in the samples `rows` `(batch,)` of bool, `old` elsewhere."""
    if isinstance(new, tuple):
        parts = (merge(backend, rows, a, b) for a, b in zip(new, old, strict=True))
        return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)
    if isinstance(new, History):
        return old.merge(rows, new)
    if new is None or new.ndim:
        return new if new is None else backend.select(rows, new, old)
    return backend.xp.where(backend.xp.all(rows), new, old)


def freeze(backend: Backend, active: Array, new: Any, old: Any) -> Any:
    """Keep the rows of `old` where not active. Histories already did so; leaves without a batch axis pass."""
    if isinstance(new, tuple):
        parts = (freeze(backend, active, a, b) for a, b in zip(new, old, strict=True))
        return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)
    if new is None or isinstance(new, History) or not new.ndim:
        return new
    return backend.select(active, new, old)
