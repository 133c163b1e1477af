"""One step of a solver as the loop takes it, shorter steps where f is not finite, and rows that do not take part."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any, Final

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.solver import Solver, map_state, map_states
from deqcore.errors import PluginError
from deqcore.linear.norms import residual_norms
from deqcore.solve.termination import PENDING, PROGRESS, REFUSED, SHORTER, SHORTEST
from deqcore.types import Array, Limits, LoopState, Map, Status, StepResult


def take_step(
    backend: Backend, solver: Solver, f: Map, start: tuple[Array, Array, Any], limits: Limits
) -> tuple[StepResult, Array, Array | None]:
    """Return the result of a step from `(z, f(z), state)`, its ‖f(z) − z‖, and its ‖f(z)‖ if `limits` need it."""
    result = advance(backend, solver, f, start)
    residual, size = solver.residual_norm(backend, result.state), result.size
    if residual is None:
        residual, size = residual_norms(backend, result.z, result.fz)
    if size is None and limits.relative:
        size = solver.output_norm(backend, result.state)
        size = backend.norm(result.fz) if size is None else size
    return result, residual, size


def advance(backend: Backend, solver: Solver, f: Map, start: tuple[Array, Array, Any]) -> StepResult:
    """Return the result of a step from `(z, f(z), state)`, by a fused kernel if there is one."""
    result = fused_step(backend, solver, f, *start)
    return _checked(solver, solver.step(backend, f, *start), start[0]) if result is None else result


def fused_step(backend: Backend, solver: Solver, f: Map, z: Array, fz: Array, state: Any) -> StepResult | None:
    """Return the step of `solver` by a fused kernel, or None if the backend has none for it."""
    return None if backend.kernels is None else backend.kernels.step(solver, f, z, fz, state)


def _checked(solver: Solver, result: Any, z: Array) -> StepResult:
    """Return the result of a step, after a check that it keeps the contract."""
    if isinstance(result, tuple) and [getattr(part, "shape", None) for part in result[:-1]] == [z.shape] * 2:
        return StepResult(*result)
    expected = f"(z, f(z), state) with two arrays of shape {tuple(z.shape)}"
    raise PluginError.returned(f"{type(solver).__name__}.step", result, expected)


def refused(carry: LoopState) -> Array:
    """Return the samples `(batch,)` whose last step led to where f is not finite."""
    return (carry.status == int(Status.RUNNING)) & (carry.since == REFUSED)


def shortened(backend: Backend, solver: Solver, carry: LoopState) -> LoopState:
    """Move samples with a refused step to the point to try next, with a residual of 0 and a reset solver state.

    Every solver then evaluates f at exactly this point, see `Solver.restarted`.
    """
    xp = backend.xp
    rows = refused(carry)
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
        state=solver.restarted(backend, rows, z, carry.state),
        status=xp.where(lost, xp.full_like(carry.status, int(Status.NONFINITE)), carry.status),
        since=xp.where(
            rows, xp.full_like(carry.since, PENDING), xp.where(lost, xp.zeros_like(carry.since), carry.since)
        ),
        length=length,
        tried=xp.where(rows, carry.best_residual, carry.tried),
    )


def masked(state: Any, active: Array | None) -> Any:
    """Return the same solver state with `active` set in each of its histories."""
    return _with_histories(state, lambda history: history.masked(active))


def finalized(state: Any) -> Any:
    """Return the solver state to keep after the solve."""
    return _with_histories(state, lambda history: history.finalized())


def _with_histories(state: Any, change: Callable[[Any], Any]) -> Any:
    """Return the same solver state with each of its histories changed."""
    if not isinstance(state, tuple):
        return change(state) if issubclass(type(state), History) else state
    parts = [_with_histories(part, change) if _MAY_HOLD[type(part)] else part for part in state]
    if all(map(is_, parts, state)):  # as in most steps
        return state
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


class _MayHold(dict[type, bool]):
    """Whether parts of this type are histories or may hold some, asked for each leaf of each step."""

    def __missing__(self, kind: type) -> bool:
        self[kind] = issubclass(kind, (tuple, History))
        return self[kind]


_MAY_HOLD: Final = _MayHold()


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
        kept = new is old or new is None or isinstance(new, History) or not new.ndim
        return new if kept else backend.select(active, new, old)

    return map_states(leaf, new, old)
