"""The native versions of steps: the same result as a solver's own `step`, on the same state, in fewer passes."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from deqcore.abc.backend import Backend
from deqcore.abc.scaling import multiply_rows
from deqcore.abc.solver import Solver
from deqcore.solvers.anderson import Anderson, AndersonState
from deqcore.solvers.auto import Auto, AutoState, skipped
from deqcore.solvers.broyden import Broyden, BroydenState
from deqcore.solvers.levels import ACCELERATED, NEWTON, PLAIN, Progress, progressed
from deqcore.types import Limits, Map, StepResult
from deqcore_torch.history import TorchHistory
from deqcore_torch.native import kernels
from deqcore_torch.native.linear import certify, grow, least_squares, low_rank, plain_step, secants
from deqcore_torch.native.pool import run
from deqcore_torch.native.views import chosen, holds, masks, ones, plain, room, view

__all__ = [
    "arnoldi", "certify", "first_figures", "grow", "keep", "least_squares", "low_rank", "measure", "norm", "plain",
    "plain_step", "probe", "project", "secants", "solve_positive", "step",
]  # fmt: skip

LARGEST: Final = 64
"""Unknowns above which LAPACK's elimination by blocks is faster."""


def probe() -> None:
    """Compile and run the smallest kernel; raise if that fails."""
    one = torch.ones(1, 1)
    measure(one, one)


def step(backend: Backend, solver: Solver, f: Map, z: Tensor, fz: Tensor, state: Any) -> StepResult | None:
    """Take one step of `solver`; return None if it, or these tensors, have no native version.

    Args:
        backend: the torch backend.
        solver: exactly a `Broyden`, `Anderson` or `Auto`; a subclass may have another step.
        f: the map on `(batch, n)`.
        z: current iterate `(batch, n)`, `plain`.
        fz: f(z).
        state: the solver's state.
    """
    if type(solver) is Broyden and solver.max_residual_growth is None:
        return _broyden(backend, f, z, state)
    if type(solver) is Anderson and solver.mixing == 1.0:
        return _anderson(backend, solver, f, fz, state)
    if type(solver) is Auto:
        return _auto(backend, solver, f, z, fz, state)
    return None


def _unit(unit: Tensor | None, batch: int) -> Any:
    """Return the units of a solver's vectors, as numbers for kernels."""
    return ones(batch) if unit is None else view(unit.to(torch.float64))


def _next(history: TorchHistory, base: Tensor, coefficients: Tensor) -> Tensor:
    """Return the point of this step's evaluation, from the step before it unless the solve starts or resumes."""
    planned = history.take_planned()
    if planned is not None:
        return planned
    out = room(base)
    _, seen = masks(history, history)
    run(
        kernels.combined,
        base.shape[0],
        base.numel() * (history.used() + 2),
        *(view(base), history.addresses(), history.store.chunk, history.used(), seen, view(coefficients), view(out)),
    )
    return out


def _broyden(backend: Backend, f: Map, z: Tensor, state: BroydenState) -> StepResult | None:
    small = state[1:5]
    if not holds(state.basis, z) or state.basis.may_be_full():
        return None
    if not all(holds(h, state.step) and h.store.chunk == h.history_size for h in small):
        return None
    basis = state.basis
    z = _next(basis, z, multiply_rows(backend, state.step, state.unit))
    value = f(z)
    slot = basis.reserve(z)
    for history in small:
        history.reserve(state.step)
    after = basis.appended()
    ahead, following, norm, size = room(z), room(state.step), room(state.norm), room(state.norm)
    active, seen = masks(basis, after)
    run(
        kernels.broyden,
        z.shape[0],
        z.numel() * (after.used() + 2),
        *(view(z), view(value), view(ahead), basis.addresses(), basis.store.chunk),
        *(slot, after.used(), basis.written < basis.history_size, active, seen),
        *(view(h.store.chunks[0]) for h in small),
        *(view(array) for array in (state.newest, state.step, state.norm)),
        *(_unit(state.unit, z.shape[0]), view(following), view(norm), view(size)),
    )
    after.plan(ahead)
    newest = torch.zeros_like(state.step)
    newest[:, slot] = 1.0
    gram, left, right, pairs = (h.appended(after.seen) for h in small)
    state = BroydenState(after, gram, left, right, pairs, newest, following, norm, None, state.unit)
    return StepResult(z, value, state, size)


def _anderson(backend: Backend, solver: Anderson, f: Map, fz: Tensor, state: AndersonState) -> StepResult | None:
    active = state.values.active  # of `auto`, samples that accelerate: others may be going
    result = _mixed(backend, solver, f, fz, state, None)
    if result is None or active is None:
        return result
    norm = torch.where(active, result.state.norm, state.norm)
    return result._replace(state=result.state._replace(norm=norm))


def _mixed(
    backend: Backend, solver: Anderson, f: Map, fz: Tensor, state: AndersonState, running: Tensor | None
) -> StepResult | None:
    """Return a step of Anderson in the rows that are active in the histories; the others keep all but the norm.

    Of those others, samples that are `running` (None for all) take plain steps, and the rest stay where they are.
    """
    if not (holds(state.values, fz) and holds(state.residuals, fz)):
        return None
    z = _next(state.values, fz, multiply_rows(backend, state.step, state.unit))
    value = f(z)
    norm, size = measure(z, value)
    active = state.values.active
    with np.errstate(all="ignore"):  # NaN is not sane, and any number is below an infinite limit
        sane = view(norm) <= solver.max_residual_growth * view(state.norm)
    if active is not None:
        sane |= ~view(active)
    if np.count_nonzero(sane) < len(sane):
        state = solver.forget(backend, torch.from_numpy(~sane), state)
    values, residuals = state.values, state.residuals
    slot = values.reserve(z)
    residuals.reserve(z)
    after = values.appended()
    following = [room(array) for array in (z, state.system, state.scale, state.target, state.step)]
    ahead = room(z)
    rows, seen = masks(values, after)
    going = chosen(running, z.shape[0])
    run(
        kernels.anderson,
        z.shape[0],
        z.numel() * (2 * after.used() + 6),
        *(view(array) for array in (z, value, fz, state.residual, ahead)),
        *(values.addresses(), residuals.addresses(), values.store.chunk),
        *(slot, after.used(), values.written < values.history_size, rows, going, seen),
        *(view(array) for array in (state.system, state.scale, state.target, state.step)),
        _unit(state.unit, z.shape[0]),
        solver.relative_ridge(np.finfo(np.float64).eps),
        *(view(array) for array in following),
    )
    after.plan(ahead)
    g, system, scale, target, step = following
    residuals = residuals.appended(after.seen)
    following_state = AndersonState(after, residuals, system, scale, target, step, g, norm, state.unit)
    informative = view(state.norm) != 0.0
    if active is not None:
        informative |= ~view(active)
    if np.count_nonzero(informative) < len(informative):
        learned = torch.from_numpy(informative)
        following_state = solver.unlearned(backend, learned.to(state.norm.dtype), following_state)
        after.plan(backend.select(learned, ahead, value))
    return StepResult(z, value, following_state, size, frozen=True)


def _auto(backend: Backend, solver: Auto, f: Map, z: Tensor, fz: Tensor, state: AutoState) -> StepResult | None:
    """Return the step of samples that are plain or accelerated; None where one takes a Newton step."""
    before, memory, old, active = z, state.memory, state.progress, state.memory.values.active
    level = view(old.level)
    running = level if active is None else np.where(view(active), level, PLAIN)
    if not plain(fz) or np.count_nonzero(running == NEWTON):
        return None
    accelerated = np.count_nonzero(running)
    if accelerated:
        rows = torch.from_numpy(running == ACCELERATED)
        result = _mixed(backend, solver.anderson, f, fz, solver.opened(backend, z, fz, state, rows), active)
        if result is None:
            return None
        z, value, stored, size = result[:4]
        norm = stored.norm
        values, residuals = stored.values.masked(active), stored.residuals.masked(active)
        stored = stored._replace(values=values, residuals=residuals, residual=memory.residual)
    else:
        z, value, stored = fz, f(fz), skipped(memory)
        norm, size = measure(z, value)
    progress, refused = _progressed(backend, solver, norm, old, active)
    size = size if active is None else torch.where(active, size, state.size)
    end = z, value, AutoState(stored._replace(norm=progress.norm), progress, state.newton, size)
    if refused is not None:
        end = solver.taken_back(backend, refused, norm, (before, fz, state), end)
    return StepResult(*end, end[2].size, frozen=True)


def _progressed(
    backend: Backend, solver: Auto, norm: Tensor, old: Progress, active: Tensor | None
) -> tuple[Progress, Tensor | None]:
    """Return `deqcore.solvers.levels.progressed`, in one pass where the rules only count."""
    rules, event = solver.rules(backend), np.zeros(1, np.bool_)
    figures = [view(figure) for figure in (norm, *old)]
    after = [np.empty_like(figures[0]) for _ in range(3)] + [np.empty_like(view(old.since))]
    run(
        kernels.steady,
        norm.shape[0],
        norm.shape[0],
        *figures,
        chosen(active, norm.shape[0]),
        *(rules.slow, rules.plain_steps, rules.patience, rules.trial, rules.max_residual_growth),
        *after,
        event,
    )
    if event[0]:
        return progressed(backend, rules, norm, old, active)
    norm, best, mark, since = map(torch.from_numpy, after)
    return Progress(old.level, norm, best, mark, since, old.rate), None


def keep(carry: Any, result: StepResult, residual: Tensor, size: Tensor | None, limits: Any) -> None:
    """Return None for `FusedKernels.update`: the loop itself updates on the host, without waiting."""
    return


def arnoldi(*parts: Any) -> None:
    """Return None: `grow` takes all steps of GMRES here."""
    return


def measure(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖f(z) − z‖ and ‖f(z)‖ of each row."""
    start, end = view(z), view(fz)
    residual, size = np.empty(len(start), start.dtype), np.empty(len(start), start.dtype)
    run(kernels.norms, len(start), 2 * start.size, start, end, residual, size)
    return torch.from_numpy(residual), torch.from_numpy(size)


def first_figures(z0: Tensor, fz: Tensor, limits: Limits) -> dict[str, Any] | None:
    """Return the result of `deqcore.solve.loop.first_figures`; None for tolerances in arrays."""
    if not (isinstance(limits.rtol, float) and isinstance(limits.atol, float)):
        return None
    start, end = view(z0), view(fz)
    figures, counts = np.empty((5, len(start)), start.dtype), np.empty((2, len(start)), np.int32)
    tolerances = limits.rtol, limits.atol, limits.tiny
    run(kernels.first_figures, len(start), 2 * start.size, start, end, *tolerances, figures, counts)
    peak, reference, mark, length, tried = figures
    status, none = counts
    return {
        "status": status, "steps": none, "best_residual": mark, "reference": reference, "peak": peak, "mark": mark,
        "since": none, "length": length, "tried": tried, "extra": none,
    }  # fmt: skip


def norm(v: Tensor) -> Tensor:
    """Return ‖v‖ of each row."""
    return measure(v, v)[1]


def project(basis: Any, w: Tensor, twice: bool) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return the result of `deqcore.linear.norms.orthogonalize`, or None if this history has no native version."""
    if not holds(basis, w):
        return None
    out, h = room(w), torch.empty(w.shape[0], basis.history_size, dtype=torch.float64)
    before, after = h.new_empty(w.shape[0]), h.new_empty(w.shape[0])
    _, seen = masks(basis, basis)
    run(
        kernels.project,
        w.shape[0],
        w.numel() * (basis.used() + 2),
        *(view(w), basis.addresses(), basis.store.chunk, basis.used(), seen, twice),
        *(view(array) for array in (out, h, before, after)),
    )
    return out, h, before, after


def solve_positive(a: Tensor, b: Tensor) -> Tensor | None:
    """Return the result of `SmallLinalg.solve_positive`, or None if there is no native version for these systems."""
    if a.shape[1] > LARGEST or a.dtype is not b.dtype or b.requires_grad:
        return None
    side = b if b.dim() == 3 else b[:, :, None]
    out = room(side)
    numbers = a.numel() + side.numel()
    run(kernels.positive, a.shape[0], numbers, view(a), view(side), view(out))
    return out if b.dim() == 3 else out[:, :, 0]
