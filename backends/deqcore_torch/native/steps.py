"""The native versions of steps: the same result as a solver's own `step`, on the same state, in fewer passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from deqcore.abc.backend import Backend
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.kernels import Krylov
from deqcore.abc.scaling import multiply_rows
from deqcore.abc.solver import Solver
from deqcore.linear.lowrank import SHARP, MultisecantInverse
from deqcore.solvers.anderson import Anderson, AndersonState
from deqcore.solvers.broyden import Broyden, BroydenState
from deqcore.types import Map, StepResult
from deqcore_torch import functorch
from deqcore_torch.history import TorchHistory
from deqcore_torch.native import kernels
from deqcore_torch.native.pool import run

LARGEST: Final = 64
"""Unknowns above which LAPACK's elimination by blocks is faster."""

VECTORS: Final = (torch.float32, torch.float64)


def probe() -> None:
    """Compile and run the smallest kernel; raise if that fails."""
    one = torch.ones(1, 1)
    measure(one, one)


def step(backend: Backend, solver: Solver, f: Map, z: Tensor, fz: Tensor, state: Any) -> StepResult | None:
    """Take one step of `solver`; return None if it, or these tensors, have no native version.

    Args:
        backend: the torch backend.
        solver: exactly a `Broyden` or `Anderson`; a subclass may have another step.
        f: the map on `(batch, n)`.
        z: current iterate `(batch, n)`, `plain`.
        fz: f(z).
        state: the solver's state.
    """
    if type(solver) is Broyden and solver.max_residual_growth is None:
        return _broyden(backend, f, z, state)
    if type(solver) is Anderson and solver.mixing == 1.0:
        return _anderson(backend, solver, f, fz, state)
    return None


def plain(z: Tensor) -> bool:
    """Return whether kernels can read this: some rows of float32 or float64, on the host, in one piece."""
    return type(z) is Tensor and z.is_cpu and z.dtype in VECTORS and z.is_contiguous() and z.numel() > 0


def _holds(history: Any, like: Tensor) -> bool:
    """Return whether the history stores vectors unchanged."""
    return type(history) is TorchHistory and history.store.dtype is like.dtype


def _room(like: Tensor) -> Tensor:
    """Allocate contiguous memory for a result, for any strides of `like`."""
    return like.new_empty(like.shape)


def view(x: Tensor) -> Any:
    """Return the same memory as a NumPy array; a copy, for reading only, if it is not contiguous."""
    x = x.detach() if x.requires_grad else x
    return x.numpy() if x.is_contiguous() else x.contiguous().numpy()


@lru_cache(64)
def _all(*shape: int) -> Any:
    """Return an array of True, shared and only read."""
    return np.ones(shape, np.bool_)


@lru_cache(64)
def _ones(batch: int) -> Any:
    """Return an array of 1, shared and only read."""
    return np.ones(batch)


def _masks(before: TorchHistory, after: TorchHistory) -> tuple[Any, Any]:
    """Return which rows are active, and which slots each has seen once the new one is written."""
    batch = after.store.batch
    active = _all(batch) if before.active is None else view(before.active)
    seen = _all(batch, after.history_size) if after.seen is None else view(after.seen)
    return active, seen


def _unit(unit: Tensor | None, batch: int) -> Any:
    """Return the units of a solver's vectors, as numbers for kernels."""
    return _ones(batch) if unit is None else view(unit.to(torch.float64))


def _next(history: TorchHistory, base: Tensor, coefficients: Tensor) -> Tensor:
    """Return the point of this step's evaluation, from the step before it unless the solve starts or resumes."""
    planned = history.take_planned()
    if planned is not None:
        return planned
    out = _room(base)
    _, seen = _masks(history, history)
    run(
        kernels.combined,
        base.shape[0],
        base.numel() * (history.used() + 2),
        *(view(base), history.addresses(), history.store.chunk, history.used(), seen, view(coefficients), view(out)),
    )
    return out


def _broyden(backend: Backend, f: Map, z: Tensor, state: BroydenState) -> StepResult | None:
    small = state[1:5]
    if not _holds(state.basis, z) or state.basis.may_be_full():
        return None
    if not all(_holds(h, state.step) and h.store.chunk == h.history_size for h in small):
        return None
    basis = state.basis
    z = _next(basis, z, multiply_rows(backend, state.step, state.unit))
    value = f(z)
    slot = basis.reserve(z)
    for history in small:
        history.reserve(state.step)
    after = basis.appended()
    ahead, following, norm, size = _room(z), _room(state.step), _room(state.norm), _room(state.norm)
    active, seen = _masks(basis, after)
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
    if not (_holds(state.values, fz) and _holds(state.residuals, fz)):
        return None
    z = _next(state.values, fz, multiply_rows(backend, state.step, state.unit))
    value = f(z)
    norm, size = measure(z, value)
    sane = norm <= solver.max_residual_growth * state.norm
    state = solver.forget(backend, ~sane, state) if not bool(sane.all()) else state
    values, residuals = state.values, state.residuals
    slot = values.reserve(z)
    residuals.reserve(z)
    after = values.appended()
    following = [_room(array) for array in (z, state.system, state.scale, state.target, state.step)]
    ahead = _room(z)
    active, seen = _masks(values, after)
    run(
        kernels.anderson,
        z.shape[0],
        z.numel() * (2 * after.used() + 6),
        *(view(array) for array in (z, value, fz, state.residual, ahead)),
        *(values.addresses(), residuals.addresses(), values.store.chunk),
        *(slot, after.used(), values.written < values.history_size, active, seen),
        *(view(array) for array in (state.system, state.scale, state.target, state.step)),
        _unit(state.unit, z.shape[0]),
        solver.relative_ridge(np.finfo(np.float64).eps),
        *(view(array) for array in following),
    )
    after.plan(ahead)
    g, system, scale, target, step = following
    residuals = residuals.appended(after.seen)
    following_state = AndersonState(after, residuals, system, scale, target, step, g, norm, state.unit)
    learned = state.norm != 0.0
    if not bool(learned.all()):
        following_state = solver.unlearned(backend, state.norm, following_state)
        after.plan(backend.select(learned, ahead, value))
    return StepResult(z, value, following_state, size)


def keep(carry: Any, result: StepResult, residual: Tensor, size: Tensor | None, limits: Any) -> None:
    """Return None for `FusedKernels.update`: the loop itself updates on the host, without waiting."""
    return


def arnoldi(space: Krylov, w: Tensor, goal: Tensor, twice: bool, shifted: bool) -> Krylov | None:
    """Return the result of `FusedKernels.arnoldi`, or None if these histories have no native version."""
    basis, columns = space.basis, space.columns
    if not (_holds(basis, w) and _holds(columns, space.null_vector)) or columns.store.chunk != columns.history_size:
        return None
    if basis.written >= basis.history_size or columns.written >= columns.history_size:
        return None
    batch, slots = space.null_vector.shape
    v, slot, column = basis.reserved(w), basis.written, columns.written
    if not columns.store.chunks:
        columns.reserved(space.null_vector.new_empty(batch, columns.store.width), zeroed=False)
    seen = _all(batch, slots) if basis.seen is None else view(basis.seen)
    before = space.source_slot, space.null_vector, space.null_norm_sq, space.residual, space.can_grow, space.steps
    small, figures = np.empty((2, batch, slots)), np.empty((2, batch))
    flags, counts = np.empty((3, batch), np.bool_), np.empty(batch, np.int32)
    can_grow, going, taken = flags
    run(
        kernels.arnoldi,
        batch,
        w.numel() * (basis.used() + 2),
        *(view(w), view(space.v), basis.addresses(), basis.store.chunk, basis.used(), seen),
        *(view(columns.store.chunks[0]), column),
        *(view(array) for array in (*before[:4], goal, *before[4:])),
        *(twice, shifted, float(torch.finfo(w.dtype).eps), slot),
        *(v.numpy(), *small, *figures, can_grow, counts, going, taken),
    )
    source_slot, null_vector = torch.from_numpy(small)
    null_norm_sq, residual = torch.from_numpy(figures)
    return Krylov(
        basis=basis.masked(None if going.all() else torch.from_numpy(going)).appended(),
        columns=columns.masked(None if taken.all() else torch.from_numpy(taken)).appended(),
        v=v,
        source_slot=source_slot,
        null_vector=null_vector,
        null_norm_sq=null_norm_sq,
        start=space.start,
        residual=residual,
        can_grow=torch.from_numpy(can_grow),
        steps=torch.from_numpy(counts),
        dimension=space.dimension + 1,
    )


def least_squares(space: Krylov, inverse: bool) -> tuple[Tensor, ...] | None:
    """Return the result of `FusedKernels.least_squares`, or None if this history has no native version."""
    columns = space.columns
    if not _holds(columns, space.null_vector) or columns.store.chunk != columns.history_size or not columns.written:
        return None
    coefficients = _room(space.null_vector)
    figures = torch.empty(5, coefficients.shape[0], dtype=torch.float64).unbind(0)
    _, seen = _masks(columns, columns)
    run(
        kernels.least_squares,
        coefficients.shape[0],
        coefficients.numel() * columns.used(),
        *(view(space.null_vector), view(columns.store.chunks[0]), seen, columns.used(), view(space.null_norm_sq)),
        *(inverse, *(view(array) for array in (coefficients, *figures))),
    )
    return coefficients, *figures


def measure(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖f(z) − z‖ and ‖f(z)‖ of each row."""
    residual, size = z.new_empty(z.shape[0]), z.new_empty(z.shape[0])
    run(kernels.norms, z.shape[0], 2 * z.numel(), view(z), view(fz), view(residual), view(size))
    return residual, size


def norm(v: Tensor) -> Tensor:
    """Return ‖v‖ of each row."""
    return measure(v, v)[1]


def project(basis: Any, w: Tensor, twice: bool) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Return the result of `deqcore.linear.norms.orthogonalize`, or None if this history has no native version."""
    if not _holds(basis, w):
        return None
    out, h = _room(w), torch.empty(w.shape[0], basis.history_size, dtype=torch.float64)
    before, after = h.new_empty(w.shape[0]), h.new_empty(w.shape[0])
    _, seen = _masks(basis, basis)
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
    out = _room(side)
    numbers = a.numel() + side.numel()
    run(kernels.positive, a.shape[0], numbers, view(a), view(side), view(out))
    return out if b.dim() == 3 else out[:, :, 0]


@dataclass(frozen=True)
class Secants(InverseJacobian):
    """The multi-secant estimate of Broyden's pairs; products that judge few vectors do not form its system in full.

    Attributes:
        basis: the residuals.
        gram: rows of the lower triangle of their Gram matrix.
        pairs: coefficients of steps and differences.
        whole: makes the estimate of the core.
    """

    basis: TorchHistory
    gram: TorchHistory
    pairs: TorchHistory
    whole: Callable[[], MultisecantInverse]

    def apply(self, v: Tensor) -> Tensor:
        """See `MultisecantInverse`."""
        return self.whole().apply(v)

    def apply_transpose(self, v: Tensor) -> Tensor:
        """See `MultisecantInverse`."""
        return self.whole().apply_transpose(v)

    def prepared(self) -> InverseJacobian:
        """See `MultisecantInverse`."""
        return self.whole().prepared()

    def apply_transpose_unregularised(self, v: Tensor) -> Tensor:
        """See `MultisecantInverse`."""
        v = v.contiguous()
        if not plain(v) or v.dtype is not self.basis.store.dtype or functorch.is_tracked(v):
            return self.whole().apply_transpose_unregularised(v)
        out, basis = _room(v), self.basis
        seen = _masks(basis, basis)[1]
        used = self.pairs.used()
        run(
            kernels.secants,
            v.shape[0],
            v.numel() * (used + 2),
            *(view(v), basis.addresses(), basis.store.chunk, seen),
            *(view(self.gram.store.chunks[0]), view(self.pairs.store.chunks[0]), used, SHARP, view(out)),
        )
        return out


def secants(basis: Any, gram: Any, pairs: Any, whole: Callable[[], MultisecantInverse]) -> InverseJacobian | None:
    """Return the result of `FusedKernels.secants`, or None if these histories have no native version."""
    if not all(type(history) is TorchHistory and history.written for history in (basis, gram, pairs)):
        return None
    small = all(h.store.chunk == h.history_size and h.store.dtype is torch.float64 for h in (gram, pairs))
    kept = basis.store.dtype in VECTORS and basis.written <= basis.history_size
    if not small or not kept or basis.used() != pairs.used() or basis.store.like.device.type != "cpu":
        return None
    return Secants(basis, gram, pairs, whole)
