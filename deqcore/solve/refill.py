"""Slots that are refilled: a batch of fixed size in which a sample that has stopped makes way for the next one.

A solve in slots is a loop state that goes through *rounds*. A round seats new samples in some slots and takes steps
with all of them. No evaluation of f is spent on a new sample alone: its slot gets z0 as if its last step had been
refused, so the next step of the batch evaluates f at exactly this point (see `Solver.restarted`). What that step
returns is f(z0); figures and solver state of the sample are then those with which any solve begins.

A slot without a sample is frozen. f sees the arguments of its last sample there, and nothing reads the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.solver import Solver, map_state
from deqcore.linear.norms import residual_norms
from deqcore.solve.compaction import take_rows
from deqcore.solve.device import DeviceLoop
from deqcore.solve.host import HostLoop, is_read, on_host, read, written
from deqcore.solve.loop import first_figures
from deqcore.solve.step import masked, merge
from deqcore.solve.termination import PENDING, spent
from deqcore.types import Array, Limits, LoopState, Map, Status

Bind: TypeAlias = Callable[..., Map]
"""From stacked arguments to f on `(slots, n)`."""


class Budget(NamedTuple):
    """The numbers of a stream, which may be scalars of the framework.

    Attributes:
        rtol: see `StoppingCriteria`.
        atol: see `StoppingCriteria`.
        max_steps: of each sample.
        steps: of this round, at most; no sample may exceed `max_steps` by them.
        spare: the round ends once at most this many samples run, if it checks.
    """

    rtol: Any
    atol: Any
    max_steps: Any
    steps: Any
    spare: Any


class Slots(NamedTuple):
    """What goes from round to round.

    Attributes:
        carry: the loop state of all slots; its figures are NumPy arrays if reading them costs no wait.
        args: leaves of the arguments, each stacked over the slots.
    """

    carry: LoopState
    args: tuple[Array, ...]

    def take(self, backend: Backend, rows: Array) -> Slots:
        """Return the slots `rows` `(k,)` only. With the capability `compaction` only."""
        carry = take_rows(backend, written(backend, self.carry), rows)
        return Slots(carry, tuple(backend.take(leaf, rows) for leaf in self.args))


class Arrivals(NamedTuple):
    """New samples.

    Attributes:
        rows: their slots, `(slots,)` of bool; None: there are none (eager backends only).
        places: their slots, a NumPy array `(k,)`; None: z0 and args have an entry for each slot.
        z0: leaves of z0 of each new sample; for each slot, any sample's where there is no new one.
        args: leaves of its arguments in the same way.
    """

    rows: Array | None
    places: Any
    z0: tuple[tuple[Array, ...], ...]
    args: tuple[tuple[Array, ...], ...]


@dataclass(frozen=True)
class Opening:
    """Make the slots, all of them without a sample. See `Round`."""

    backend: Backend
    solver: Solver
    size: int

    def __call__(self, bind: Bind, z0: tuple[Array, ...], args: tuple[Array, ...]) -> Slots:
        """Return slots that hold copies of one sample, which takes no part."""
        backend, xp = self.backend, self.backend.xp
        z = _stacked(backend, (z0,) * self.size)
        norm, size = residual_norms(backend, z, z)
        figures = first_figures(xp, Limits.of(xp, backend.eps(z), 0.0, 0.0, 1), norm, size, size)
        figures["status"] = xp.full_like(figures["status"], int(Status.CONVERGED))
        state = self.solver.init(backend, z, z)
        return Slots(
            LoopState(z=z, fz=z, state=state, best_z=z, best_fz=z, **figures),
            tuple(xp.stack([leaf] * self.size) for leaf in args),
        )


class Seats:
    """The slots of new samples, whose rows are written and read by index, or by a mask without one.

    Attributes:
        rows: see `Arrivals`.
        z0: initial iterates, `(k, n)`; with a mask `(slots, n)`.
    """

    def __init__(self, backend: Backend, rows: Array, places: Any, z0: Array) -> None:
        self.backend, self.rows, self.places, self.z0 = backend, rows, places, z0
        self.index = None if places is None else backend.asarray(places, dtype="int64", like=z0)

    def put(self, old: Array, new: Any) -> Array:
        """Return `old` with `new`, which has a row for each row of z0 or is a number, in the rows of new samples."""
        if is_read(self.backend, old):
            end = old.copy()
            end[self.places] = new
            return end
        if isinstance(new, int | float):
            new = self.backend.xp.full_like(self.take(old), new)
        return (
            self.backend.select(self.rows, new, old) if self.index is None else self.backend.put(old, self.index, new)
        )

    def take(self, x: Array) -> Array:
        """Return the rows of `x` that belong to the rows of z0."""
        if self.index is None:
            return x
        return x[self.places] if is_read(self.backend, x) else self.backend.take(x, self.index)

    def apply(self, body: Callable[[Any], Any], carry: Any) -> Any:
        """Return `body(carry)` if there are new samples. With an index there are."""
        return body(carry) if self.index is not None else self.backend.cond(self.rows, body, carry)


@dataclass(frozen=True)
class Round:
    """Seat new samples and take steps. Two rounds are equal if a tracing backend may use one program for both.

    Attributes:
        backend: the backend of the arrays.
        solver: the method.
        patience: see `StoppingCriteria`.
        single: every round is one step, so that no loop is compiled.
        checks: whether a round looks after each step whether enough samples have stopped.
    """

    backend: Backend
    solver: Solver
    patience: int
    single: bool
    checks: bool

    def __call__(self, bind: Bind, slots: Slots, arrivals: Arrivals, budget: Budget) -> tuple[Slots, Array]:
        """Return the slots after the round, and the evaluations of f of each sample `(slots,)`."""
        backend = self.backend
        limits = Limits.of(backend.xp, backend.eps(slots.carry.z), budget.rtol, budget.atol, self.patience)
        seats = None
        if arrivals.rows is not None:
            seats = Seats(backend, arrivals.rows, arrivals.places, _stacked(backend, arrivals.z0))
            slots = seats.apply(lambda slots: self._seated(slots, seats, arrivals.args), slots)
        carry = read(backend, slots.carry) or slots.carry
        loop = (HostLoop if is_read(backend, carry.status) else DeviceLoop)(
            backend, self.solver, bind(slots.args), limits, budget.spare
        )
        carry = loop.advance(carry, 1, 1)
        if seats is not None:
            carry = seats.apply(lambda carry: self._begun(carry, seats, limits), carry)
        if not self.single:
            carry = loop.advance(carry, budget.steps - 1, 1 if self.checks else _NO_CHECK)
        carry = self._expired(carry, budget.max_steps)
        carry = carry._replace(state=masked(carry.state, None))
        steps = backend.host.from_numpy_view(carry.steps) if is_read(backend, carry.steps) else carry.steps
        return Slots(carry, slots.args), self.solver.evaluations(backend, steps, carry.state)

    def _seated(self, slots: Slots, seats: Seats, args: tuple[tuple[Array, ...], ...]) -> Slots:
        """Return the slots with z0 in the seats, where the next step evaluates f."""
        backend, solver, carry = self.backend, self.solver, slots.carry
        z = seats.put(carry.z, seats.z0)
        state = merge(backend, seats.rows, solver.init(backend, z, z), carry.state)
        state = _forgotten(solver.restarted(backend, seats.rows, z, state), seats.rows)
        fz = seats.put(carry.fz, seats.z0)
        best = carry.best_z, carry.best_fz  # of new samples `_begun` writes them
        if best[0] is carry.z and best[1] is carry.fz:
            best = z, fz
        figures = {name: seats.put(getattr(carry, name), value) for name, value in _PENDING.items()}
        carry = carry._replace(z=z, fz=fz, best_z=best[0], best_fz=best[1], state=state, **figures)
        placed = zip(slots.args, zip(*args, strict=True), strict=True)
        return Slots(carry, tuple(seats.put(old, backend.xp.stack(list(new))) for old, new in placed))

    def _begun(self, carry: LoopState, seats: Seats, limits: Limits) -> LoopState:
        """Return the loop state in which new samples, evaluated by the last step, are before their first one."""
        backend, z0, xp = self.backend, seats.z0, self.backend.xp
        lost = seats.take(carry.since) < 0  # f(z0) is not finite
        figures = [*residual_norms(backend, carry.z, carry.fz), backend.norm(z0)]
        if is_read(backend, lost):
            xp, limits = np, on_host(backend, limits)
            figures = [backend.host.numpy_view(figure) for figure in figures]
        residual, size, start = seats.take(figures[0]), seats.take(figures[1]), figures[2]
        residual = xp.where(lost, xp.full_like(residual, float("inf")), residual)
        with np.errstate(all="ignore"):
            first = first_figures(xp, limits, residual, size, start)
        first["status"] = xp.where(lost, xp.full_like(first["status"], int(Status.NONFINITE)), first["status"])
        z, best_z, best_fz = carry.z, carry.best_z, carry.best_fz
        if not is_read(backend, lost) or lost.any():
            z = seats.put(carry.z, z0)
        if best_z is not z or best_fz is not carry.fz:
            best_z, best_fz = seats.put(best_z, z0), seats.put(best_fz, seats.take(carry.fz))
        return carry._replace(
            z=z,
            best_z=best_z,
            best_fz=best_fz,
            state=self._renewed(masked(carry.state, None), seats.rows, z, carry.fz),
            **{name: seats.put(getattr(carry, name), value) for name, value in first.items()},
        )

    def _renewed(self, state: Any, rows: Array, z: Array, fz: Array) -> Any:
        """Return the solver state of samples that begin; histories keep their place in the ring where they can."""
        backend, solver = self.backend, self.solver
        ready = solver.started(backend, z, state)
        left = rows if ready is None else rows & ~ready

        def renew(state: Any) -> Any:
            blank = map_state(state, lambda leaf: leaf.erase(left) if isinstance(leaf, History) else leaf)
            return merge(backend, left, solver.init(backend, z, fz), blank)

        return backend.cond(left, renew, state)

    def _expired(self, carry: LoopState, max_steps: Any) -> LoopState:
        """Return the loop state with the statuses of samples that have spent their budget."""
        backend = self.backend
        left = (carry.status == int(Status.RUNNING)) & (carry.steps >= max_steps)

        def ended(carry: LoopState) -> LoopState:
            xp, (residual, size) = backend.xp, residual_norms(backend, carry.z, carry.fz)
            if is_read(backend, left):
                xp, residual, size = np, backend.host.numpy_view(residual), backend.host.numpy_view(size)
            with np.errstate(all="ignore"):
                status = spent(xp, residual, size, carry.path, carry.steps)
            return carry._replace(status=xp.where(left, status, carry.status))

        if is_read(backend, left):
            return ended(carry) if left.any() else carry
        end: LoopState = backend.cond(left, ended, carry)
        return end


_NO_CHECK: Final = 2**30
_PENDING: Final = {
    "status": int(Status.RUNNING),
    "steps": 0,
    "best_residual": float("inf"),
    "reference": 0.0,
    "peak": 0.0,
    "mark": float("inf"),
    "since": PENDING,
    "length": 0.5,
    "tried": float("inf"),
}
"""Figures of a sample of which f has not been evaluated."""


def _stacked(backend: Backend, samples: tuple[tuple[Array, ...], ...]) -> Array:
    """Return the matrix `(slots, n)` of one tuple of leaves per slot."""
    xp = backend.xp
    rows = [[xp.reshape(leaf, (-1,)) for leaf in leaves] for leaves in samples]
    return xp.stack([leaves[0] if len(leaves) == 1 else xp.concat(leaves) for leaves in rows])


def _forgotten(state: Any, rows: Array) -> Any:
    """Return the solver state whose histories hold no vector of the samples `rows`."""
    return map_state(masked(state, None), lambda leaf: leaf.restart(rows) if isinstance(leaf, History) else leaf)
