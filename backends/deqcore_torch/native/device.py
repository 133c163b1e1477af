"""Native versions for GPUs: steps, products with histories, and the loop's update after a step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from deqcore.abc.backend import Backend
from deqcore.abc.kernels import Krylov
from deqcore.abc.scaling import multiply_rows
from deqcore.abc.solver import Solver
from deqcore.solve.termination import BLOW_UP, DROP, FALL, LOST, PROGRESS, REFUSED
from deqcore.solvers.anderson import Anderson, AndersonState
from deqcore.solvers.broyden import Broyden, BroydenState
from deqcore.types import Limits, LoopState, Map, Status, StepResult
from deqcore_torch.history import TorchHistory
from deqcore_torch.native import fused
from deqcore_torch.native.launch import Kernel

KINDS: Final = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
MOST: Final = 64  # slots: small matrices up to this size stay in registers
AT_ONCE: Final = 16  # slots whose products one program sums
FEW: Final = 4  # slots that it combines at once
BLOCK: Final = 256  # numbers of each that it reads at once
WIDEST: Final = 1024  # slots of a basis: one vector of coefficients stays in registers
COLUMNS: Final = 1024  # numbers of the result that one program writes
RUN: Final = SimpleNamespace(**{name: Kernel(getattr(fused, name)) for name in fused.KERNELS})
EPS: Final = float(np.finfo(np.float64).eps)
LOW: Final = float(np.finfo(np.float64).smallest_normal) ** (1 / 3)  # norms from here …
HIGH: Final = 1 / LOW  # … to there are roots of plain sums of squares


def plain(x: Tensor) -> bool:
    """Return whether kernels can read this: some rows of floats on a GPU, in one piece."""
    return type(x) is Tensor and x.is_cuda and x.dtype in KINDS and x.numel() > 0 and x.is_contiguous()


def probe() -> None:
    """Compile and run the smallest kernel: Triton needs a C compiler, and does not support every GPU.

    Raises:
        Exception: compiling or running failed.
    """
    one = torch.ones(1, 1, device="cuda")
    measure(one, one)


def step(backend: Backend, solver: Solver, f: Map, z: Tensor, fz: Tensor, state: Any) -> StepResult | None:
    """Take one step of `solver`; return None if it, or these tensors, have no native version.

    Args: as for `deqcore_torch.native.steps.step`.
    """
    if type(solver) is Broyden and solver.max_residual_growth is None:
        return _broyden(backend, f, z, state)
    if type(solver) is Anderson and solver.mixing == 1.0:
        return _anderson(backend, solver, f, z, fz, state)
    return None


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Make the device of x the current one, on which kernels run."""
    return nullcontext() if not x.is_cuda or x.device.index == torch.cuda.current_device() else torch.cuda.device_of(x)


@cache
def _lanes(history_size: int) -> int:
    return max(4, int(triton.next_power_of_2(history_size)))


def _spans(n: int) -> int:
    return int(triton.cdiv(n, fused.SPAN))


def _holds(history: Any) -> bool:
    return type(history) is TorchHistory and history.store.dtype in KINDS and history.history_size <= MOST


def _seen(history: TorchHistory, like: Tensor) -> tuple[Tensor, bool]:
    """Return which slots each sample has seen, and whether that mask is used."""
    return (like, False) if history.seen is None else (history.seen, True)


@cache
def _kinds(dtype: torch.dtype, compute: torch.dtype, width: int) -> dict[str, Any]:
    return {"kind": KINDS[dtype], "wide": KINDS[compute], "aligned": width * dtype.itemsize % 16 == 0}


def _stored(history: TorchHistory) -> dict[str, Any]:
    """Return the arguments of kernels that describe the vectors of a history."""
    return _kinds(history.store.dtype, history.store.compute, history.store.width)


def _products(history: TorchHistory) -> dict[str, Any]:
    return {**_stored(history), "slots_at_once": AT_ONCE, "block": BLOCK, "span": fused.SPAN}


def dots(history: TorchHistory, v: Tensor) -> Tensor:
    """Return `History.dot` of `v` `(batch, n)`, in one pass over the vectors."""
    (batch, n), history_size = v.shape, history.history_size
    parts = v.new_empty((_spans(n), batch, history_size), dtype=history.store.compute)
    seen, masked = _seen(history, v)
    with _on(v):
        RUN.dots(
            (batch, parts.shape[0], triton.cdiv(history_size, AT_ONCE)),
            *(v, history.table(), seen, parts, n, batch, history_size, history.used(), history.store.chunk),
            **_products(history),
            has_seen=masked,
        )
    return parts[0].to(history.store.wide) if parts.shape[0] == 1 else parts.sum(0, dtype=history.store.wide)


def combined(
    history: TorchHistory, coefficients: Tensor, base: Tensor | None, active: Tensor | None = None,
    stay: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return base + Σ c_k h_k `(batch, n)` in the dtype of the state; `stay` for samples that are not `active`."""
    store = history.store
    out = store.like.new_empty((store.batch, store.width)) if base is None else torch.empty_like(base)
    seen, masked = _seen(history, out)
    with _on(out):
        RUN.combined(
            (store.batch, triton.cdiv(store.width, COLUMNS)),
            *(out if base is None else base, coefficients, history.table(), seen),
            *(out if active is None else active, out if stay is None else stay, out),
            *(store.width, store.batch, history.history_size, history.used(), store.chunk),
            **_stored(history),
            has_base=base is not None,
            has_seen=masked,
            has_active=active is not None,
            slots_at_once=FEW,
            block=COLUMNS,
        )
    return out


def _everyone(history: TorchHistory) -> Tensor:
    if history.active is not None:
        return history.active
    return torch.ones(history.store.batch, dtype=torch.bool, device=history.store.like.device)


def _like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _dense(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def _unit(unit: Tensor | None, norm: Tensor) -> Tensor:
    """Return the units of a solver's vectors, as numbers for kernels."""
    return torch.ones_like(norm) if unit is None else unit.contiguous()


def _broyden(backend: Backend, f: Map, z: Tensor, state: BroydenState) -> StepResult | None:
    basis, small = state.basis, (state.gram, state.left, state.right, state.pairs)
    if not _holds(basis) or basis.may_be_full():
        return None
    if not all(_holds(h) and h.store.chunk == h.history_size for h in small):
        return None
    z = combined(basis, multiply_rows(backend, state.step, state.unit), z, basis.active, z)
    value = f(z).contiguous()
    used, slot, fresh = basis.used(), basis.reserve(z), int(basis.written < basis.history_size)
    for history in small:
        history.reserve(state.step)
    (batch, n), history_size = z.shape, basis.history_size
    active, unit = _everyone(basis), _unit(state.unit, state.norm)
    spans = _spans(n)
    parts = z.new_empty((spans, batch, history_size), dtype=basis.store.compute)
    squares = z.new_empty((spans, batch, 3), dtype=torch.float64)
    newest, following, norm, size = _like(state.newest, state.step, state.norm, state.norm)
    after_seen = torch.empty((batch, history_size), dtype=torch.bool, device=z.device)
    seen, masked = _seen(basis, z)
    with _on(z):
        RUN.broyden_products(
            (batch, spans, triton.cdiv(history_size, AT_ONCE)),
            *(z, value, unit, basis.table(), seen, active, parts, squares),
            *(n, batch, history_size, used, slot, basis.store.chunk, fresh),
            **_products(basis),
            has_seen=masked,
        )
        lanes = _lanes(history_size)
        RUN.broyden_algebra(
            (batch,),
            *(parts, squares, spans, seen, active, unit, *(h.store.chunks[0] for h in small)),
            *_dense(state.newest, state.step, state.norm),
            *(after_seen, newest, following, norm, size),
            *(batch, history_size, used, slot, fresh),
            eps=EPS,
            has_seen=masked,
            lanes=lanes,
            at_once=fused.PARTS,
            warps=8 if lanes > 32 else 4,
        )
    after, gram, left, right, pairs = (h.appended(after_seen) for h in (basis, *small))
    state = BroydenState(after, gram, left, right, pairs, newest, following, norm, None, state.unit)
    return StepResult(z, value, state, size, frozen=True, still=True)


def _anderson(
    backend: Backend, solver: Anderson, f: Map, z: Tensor, fz: Tensor, state: AndersonState
) -> StepResult | None:
    values, residuals = state.values, state.residuals
    if not (_holds(values) and _holds(residuals)) or values.history_size > MOST // 2:
        return None
    z = combined(values, multiply_rows(backend, state.step, state.unit), fz, values.active, z)
    value = f(z).contiguous()
    used, slot, fresh = values.used(), values.reserve(z), int(values.written < values.history_size)
    residuals.reserve(z)
    (batch, n), history_size = z.shape, values.history_size
    active, unit = _everyone(values), _unit(state.unit, state.norm)
    spans = _spans(n)
    parts = z.new_empty((spans, batch, history_size), dtype=values.store.compute)
    squares = z.new_empty((spans, batch, 4), dtype=torch.float64)
    g, system, scale, target, following, norm, size = _like(z, *state[2:6], state.norm, state.norm)
    after_seen = torch.empty((batch, history_size), dtype=torch.bool, device=z.device)
    seen, masked = _seen(values, z)
    with _on(z):
        RUN.anderson_products(
            (batch, spans, triton.cdiv(history_size, AT_ONCE)),
            *(
                z,
                value,
                unit,
                *_dense(fz, state.residual),
                g,
                values.table(),
                residuals.table(),
                seen,
                active,
                parts,
                squares,
            ),
            *(n, batch, history_size, used, slot, values.store.chunk, fresh),
            **_products(values),
            has_seen=masked,
        )
        RUN.anderson_algebra(
            (batch,),
            *(parts, squares, spans, seen, active, unit),
            *_dense(state.system, state.scale, state.target, state.step, state.norm),
            *(after_seen, system, scale, target, following, norm, size),
            *(batch, history_size, used, slot, fresh, solver.max_residual_growth),
            ridge=solver.relative_ridge(EPS),
            has_seen=masked,
            lanes=_lanes(history_size),
            at_once=fused.PARTS,
        )
    values, residuals = values.appended(after_seen), residuals.appended(after_seen)
    state = AndersonState(values, residuals, system, scale, target, following, g, norm, state.unit)
    return StepResult(z, value, state, size, frozen=True, still=True)


def first_figures(*parts: Any) -> None:
    """Return None: the loop asks the device for the norms alone, because it does not wait for them."""
    return


def measure(z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
    """Return `deqcore.linear.norms.residual_norms` in one pass."""
    (batch, n), (z, fz) = z.shape, _dense(z, fz)
    ranges = z.dtype is torch.float64  # squares of other dtypes are in the range of float64
    parts = z.new_empty((6 if ranges else 2, _spans(n), batch), dtype=torch.float64)
    with _on(z):
        RUN.squares(
            (batch, parts.shape[1]),
            *(z, fz, parts, n, batch),
            wide=KINDS[_norm_dtype(z.dtype)],
            ranges=ranges,
            block=COLUMNS,
            span=fused.SPAN,
        )
    norms = parts.sum(1).sqrt_()
    if ranges:
        plain, up, down = norms.view(3, 2, batch)
        norms = torch.where(plain > HIGH, down * fused.UP.value, torch.where(plain < LOW, up * fused.DOWN.value, plain))
    residual, size = norms.to(_norm_dtype(z.dtype)).unbind()
    return residual, size


def norm(v: Tensor) -> Tensor:
    """Return ‖v‖ of each row, in one pass."""
    return measure(v, v)[1]


def _norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of norms of such vectors."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def keep(
    carry: LoopState, result: StepResult, residual: Tensor, size: Tensor | None, limits: Limits
) -> LoopState | None:
    """Return the loop state after a step, but with the solver's state of `carry`."""
    rtol, atol = limits.rtol, limits.atol
    if not isinstance(rtol, float) or (rtol != 0.0 and not isinstance(atol, float)):
        return None
    batch, n = result.z.shape
    size = measure(result.z, result.fz)[1] if size is None else size
    status, steps, since = _like(carry.status, carry.steps, carry.since)
    best, peak, mark = _like(residual, residual, residual)
    fz, best_z, best_fz = (torch.empty_like(result.z) for _ in range(3))
    z = result.z if result.still else torch.empty_like(result.z)
    goal = torch.zeros_like(residual) + atol if rtol == 0.0 else rtol * size
    goal = goal + atol if rtol != 0.0 and atol != 0.0 else goal
    with _on(result.z):
        RUN.keep(
            (batch, triton.cdiv(n, COLUMNS)),
            *_dense(carry.status, carry.steps, residual, goal, size, carry.reference),
            *_dense(carry.best_residual, carry.peak, carry.mark, carry.since),
            *(status, steps, best, peak, mark, since),
            *_dense(result.z, result.fz, carry.z, carry.fz, carry.best_z, carry.best_fz),
            *(z, fz, best_z, best_fz, n, limits.patience, rtol, 0.0 if rtol == 0.0 else atol, limits.slack),
            lost=limits.lost,
            hidden=limits.hidden,
            tiny=limits.tiny,
            most=LOST,
            fall=FALL,
            drop=DROP,
            blow_up=BLOW_UP,
            progress=PROGRESS,
            refused=REFUSED,
            running=int(Status.RUNNING),
            converged=int(Status.CONVERGED),
            stalled=int(Status.STALLED),
            diverged=int(Status.DIVERGED),
            absolute=rtol == 0.0,
            frozen=result.still,
            block=COLUMNS,
        )
    return carry._replace(
        z=z, fz=fz, status=status, steps=steps, best_z=best_z, best_fz=best_fz, best_residual=best, peak=peak,
        mark=mark, since=since,
    )  # fmt: skip


def project(basis: Any, w: Tensor, twice: bool) -> None:
    """Return None: `deqcore.linear.norms.orthogonalize` is part of `arnoldi` here."""
    return


def least_squares(space: Krylov, inverse: Tensor | bool) -> None:
    """Return None: the core's own operations do not wait for the device."""
    return


def solve_positive(a: Tensor, b: Tensor) -> None:
    """Return None: a library solves them."""
    return


def grow(*parts: Any, **options: Any) -> None:
    """Return None: the core asks for one `arnoldi` at a time, and looks at the device now and then."""
    return


def plain_step(*parts: Any) -> None:
    """Return None: its decisions are made on the host."""
    return


def certify(*parts: Any) -> None:
    """Return None: there is no native estimate to judge with."""
    return


def low_rank(*parts: Any) -> None:
    """Return None: products with a history take one pass each here."""
    return


def secants(*parts: Any) -> None:
    """Return None: the core's own estimate does not wait for the device."""
    return


def arnoldi(space: Krylov, w: Tensor, goal: Tensor, twice: bool, shifted: bool) -> Krylov | None:
    """Return the space after a step of GMRES with the product `w`; None if this space has no native version."""
    basis, columns = space.basis, space.columns
    if (
        type(basis) is not TorchHistory
        or type(columns) is not TorchHistory
        or columns.store.chunk != columns.history_size
    ):
        return None
    if basis.history_size > WIDEST or basis.written >= basis.history_size:
        return None
    w = space.v - w if shifted else w
    (batch, n), history_size, used = w.shape, basis.history_size, basis.used()
    wide, store = torch.float64, basis.store
    spans, blocks = _spans(n), int(triton.cdiv(n, COLUMNS))
    seen, masked = _seen(basis, w)
    columns_seen, columns_masked = _seen(columns, w)
    slot, column = basis.reserve(w), columns.reserve(space.null_vector.new_empty((batch, 2 * history_size)))
    with _on(w):

        def project(v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            parts = v.new_empty((spans, batch, history_size), dtype=store.compute)
            before, after = v.new_empty((spans, batch), dtype=wide), v.new_empty((blocks, batch), dtype=wide)
            RUN.projections(
                (batch, spans, triton.cdiv(history_size, AT_ONCE)),
                *(v, basis.table(), seen, parts, before, n, batch, history_size, used, store.chunk),
                **_products(basis),
                has_seen=masked,
            )
            rest = torch.empty_like(v)
            RUN.rejected(
                (batch, blocks),
                *(v, parts, spans, basis.table(), seen, rest, after, n, batch, history_size, used, store.chunk),
                **_stored(basis),
                has_seen=masked,
                slots_at_once=FEW,
                block=COLUMNS,
                at_once=fused.PARTS,
            )
            return rest, parts, before, after

        w, first, before, after = project(w.contiguous())
        second = first
        if twice:
            w, second, _, after = project(w)
        null_norm_sq, residual, height, source_slot, null_vector, can_grow, steps = _like(
            *(
                space.null_norm_sq,
                space.residual,
                space.null_norm_sq,
                space.source_slot,
                space.null_vector,
                space.can_grow,
                space.steps,
            )
        )
        basis_seen = torch.empty((batch, history_size), dtype=torch.bool, device=w.device)
        next_columns_seen = torch.empty((batch, history_size - 1), dtype=torch.bool, device=w.device)
        RUN.arnoldi_algebra(
            (batch,),
            *(first, second, spans, before, after, blocks, seen, columns_seen, columns.store.chunks[0]),
            *_dense(
                space.source_slot,
                space.null_vector,
                space.null_norm_sq,
                space.residual,
                goal,
                space.can_grow,
                space.steps,
            ),
            *(basis_seen, next_columns_seen, source_slot, null_vector, null_norm_sq, residual, can_grow, steps, height),
            *(batch, history_size, used, slot, column, int(columns.written < columns.history_size)),
            eps=float(torch.finfo(w.dtype).eps),
            twice=twice,
            has_basis_seen=masked,
            has_columns_seen=columns_masked,
            lanes=_lanes(history_size),
            at_once=fused.PARTS,
        )
        v = torch.empty_like(w)
        RUN.arnoldi_vector(
            (batch, blocks),
            *(w, space.v, height, basis.table(), v, n, batch, slot, store.chunk, 1),
            **_stored(basis),
            block=COLUMNS,
        )
    return Krylov(
        basis=basis.masked(None).appended(basis_seen),
        columns=columns.masked(None).appended(next_columns_seen),
        v=v,
        source_slot=source_slot,
        null_vector=null_vector,
        null_norm_sq=null_norm_sq,
        start=space.start,
        residual=residual,
        can_grow=can_grow,
        steps=steps,
        dimension=space.dimension + 1,
    )
