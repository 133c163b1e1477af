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
from typing import Any, NamedTuple, TypeAlias

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.solver import Solver, map_state
from deqcore.linear.norms import residual_norms
from deqcore.solve.device import DeviceLoop
from deqcore.solve.host import HostLoop, read
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
        steps: of this round; no sample may exceed `max_steps` by them.
    """

    rtol: Any
    atol: Any
    max_steps: Any
    steps: Any


class Slots(NamedTuple):
    """What goes from round to round.

    Attributes:
        carry: the loop state of all slots.
        args: leaves of the arguments, each stacked over the slots.
    """

    carry: LoopState
    args: tuple[Array, ...]


class Arrivals(NamedTuple):
    """New samples.

    Attributes:
        rows: their slots, `(slots,)` of bool; None: there are none (eager backends only).
        z0: leaves of z0 of each slot's new sample, any sample's in the other slots.
        args: leaves of its arguments in the same way.
    """

    rows: Array | None
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


@dataclass(frozen=True)
class Round:
    """Seat new samples and take steps. Two rounds are equal if a tracing backend may use one program for both.

    Attributes:
        backend: the backend of the arrays.
        solver: the method.
        patience: see `StoppingCriteria`.
        single: every round is one step, so that no loop is compiled.
    """

    backend: Backend
    solver: Solver
    patience: int
    single: bool

    def __call__(self, bind: Bind, slots: Slots, arrivals: Arrivals, budget: Budget) -> tuple[Slots, Array]:
        """Return the slots after the round, and the evaluations of f of each sample `(slots,)`."""
        backend, rows = self.backend, arrivals.rows
        like = slots.carry.z
        limits = Limits.of(backend.xp, backend.eps(like), budget.rtol, budget.atol, self.patience)
        z0 = like
        if rows is not None:
            z0 = _stacked(backend, arrivals.z0)
            slots = backend.cond(rows, lambda slots: self._seated(slots, rows, z0, arrivals.args), slots)
        carry, f = slots.carry, bind(slots.args)
        host = read(backend, carry) is not None
        loop = (HostLoop if host else DeviceLoop)(backend, self.solver, f, limits)
        carry = loop.run(carry, 1, 1)
        if rows is not None:
            carry = backend.cond(rows, lambda carry: self._begun(carry, rows, z0, limits), carry)
        if not self.single:
            carry = loop.run(carry, budget.steps - 1, _NO_CHECK)
        carry = self._expired(carry, budget.max_steps)
        carry = carry._replace(state=masked(carry.state, None))
        return Slots(carry, slots.args), self.solver.evaluations(backend, carry.steps, carry.state)

    def _seated(self, slots: Slots, rows: Array, z0: Array, args: tuple[tuple[Array, ...], ...]) -> Slots:
        """Return the slots with z0 in `rows`, where the next step evaluates f."""
        backend, xp, solver, carry = self.backend, self.backend.xp, self.solver, slots.carry
        z = backend.select(rows, z0, carry.z)
        state = merge(backend, rows, solver.init(backend, z, z), carry.state)
        state = _forgotten(solver.restarted(backend, rows, z, state), rows)
        nothing, unknown = xp.zeros_like(carry.peak), xp.full_like(carry.peak, float("inf"))
        figures = {"best_residual": unknown, "reference": nothing, "peak": nothing, "mark": unknown, "tried": unknown}
        carry = carry._replace(
            z=z,
            fz=backend.select(rows, z0, carry.fz),
            best_z=backend.select(rows, z0, carry.best_z),
            best_fz=backend.select(rows, z0, carry.best_fz),
            state=state,
            status=xp.where(rows, xp.full_like(carry.status, int(Status.RUNNING)), carry.status),
            steps=xp.where(rows, xp.zeros_like(carry.steps), carry.steps),
            since=xp.where(rows, xp.full_like(carry.since, PENDING), carry.since),
            length=xp.where(rows, xp.full_like(carry.length, 0.5), carry.length),
            **{name: xp.where(rows, value, getattr(carry, name)) for name, value in figures.items()},
        )
        placed = zip(slots.args, zip(*args, strict=True), strict=True)
        return Slots(carry, tuple(backend.select(rows, xp.stack(list(new)), old) for old, new in placed))

    def _begun(self, carry: LoopState, rows: Array, z0: Array, limits: Limits) -> LoopState:
        """Return the loop state in which the samples `rows`, evaluated by the last step, are before their first one."""
        backend, xp = self.backend, self.backend.xp
        lost = rows & (carry.since < 0)  # f(z0) is not finite
        z = backend.select(rows, z0, carry.z)
        residual, size = residual_norms(backend, z, carry.fz)
        residual = xp.where(lost, xp.full_like(residual, float("inf")), residual)
        first = first_figures(xp, limits, residual, size, backend.norm(z))
        first["status"] = xp.where(lost, xp.full_like(first["status"], int(Status.NONFINITE)), first["status"])
        return carry._replace(
            z=z,
            best_z=backend.select(rows, z0, carry.best_z),
            best_fz=backend.select(rows, carry.fz, carry.best_fz),
            state=self._renewed(masked(carry.state, None), rows, z, carry.fz),
            **{name: xp.where(rows, value, getattr(carry, name)) for name, value in first.items()},
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
        backend, xp = self.backend, self.backend.xp
        left = (carry.status == int(Status.RUNNING)) & (carry.steps >= max_steps)

        def ended(carry: LoopState) -> LoopState:
            residual, size = residual_norms(backend, carry.z, carry.fz)
            status = spent(xp, residual, size, carry.path, carry.steps)
            return carry._replace(status=xp.where(left, status, carry.status))

        end: LoopState = backend.cond(left, ended, carry)
        return end


_NO_CHECK = 2**30


def _stacked(backend: Backend, samples: tuple[tuple[Array, ...], ...]) -> Array:
    """Return the matrix `(slots, n)` of one tuple of leaves per slot."""
    xp = backend.xp
    rows = [[xp.reshape(leaf, (-1,)) for leaf in leaves] for leaves in samples]
    return xp.stack([leaves[0] if len(leaves) == 1 else xp.concat(leaves) for leaves in rows])


def _forgotten(state: Any, rows: Array) -> Any:
    """Return the solver state whose histories hold no vector of the samples `rows`."""
    return map_state(masked(state, None), lambda leaf: leaf.restart(rows) if isinstance(leaf, History) else leaf)
