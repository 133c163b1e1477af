"""The loop on devices where reading a number waits, and in traced code: every decision is an operation on arrays."""

from __future__ import annotations

from deqcore.abc.backend import Backend
from deqcore.abc.solver import Solver
from deqcore.linear.norms import residual_norms
from deqcore.solve.step import freeze, masked, refused, shortened, take_step
from deqcore.solve.termination import spent, verdict
from deqcore.types import Array, Limits, LoopState, Map, Status


class DeviceLoop:
    """The loop on devices where reading a number waits, and in traced code.

    Refused steps are read together with the check whether all samples have stopped; until then the sample takes no step
    that counts. Traced code checks in the loop itself.

    Args:
        backend: the backend of the arrays.
        solver: the method.
        f: the map on `(batch, n)`.
        limits: of the verdict.
        spare: the loop ends once at most this many samples run.
    """

    def __init__(self, backend: Backend, solver: Solver, f: Map, limits: Limits, spare: int | Array = 0) -> None:
        self.backend, self.solver, self.f, self.limits, self.spare = backend, solver, f, limits, spare
        self.pending = False
        self.waits = backend.capabilities.eager and backend.capabilities.accelerator

    def run(self, carry: LoopState, steps: int | Array, check_every: int | str) -> LoopState:
        """Return the loop state after at most `steps` steps."""
        return self.advance(carry, steps, check_every)

    def advance(self, carry: LoopState, steps: int | Array, check_every: int | str) -> LoopState:
        """Return the same as `run`, as `HostLoop.advance` does on the host."""
        end: LoopState = self.backend.loop(self.running, self.step, carry, steps, check_every)
        return end

    def running(self, carry: LoopState) -> Array | bool:
        """Return whether enough samples still run; on a device the same wait also reads whether steps were refused."""
        backend, xp = self.backend, self.backend.xp
        running = carry.status == int(Status.RUNNING)
        none = isinstance(self.spare, int) and self.spare == 0
        going = xp.any(running) if none else xp.sum(xp.astype(running, xp.int32)) > self.spare
        if not self.waits:
            return going
        both = 2 * xp.astype(going, xp.int32) + xp.astype(xp.any(refused(carry)), xp.int32)
        answer = int(backend.to_numpy(both))
        self.pending = answer % 2 == 1
        return answer >= 2

    def step(self, carry: LoopState) -> LoopState:
        """Take one step, with refused steps shortened: before it if a check has found any, or after it."""
        if self.pending:
            self.pending = False
            carry = self._shortened(carry)
        after = self._stepped(carry)
        if self.waits:
            return after
        shortened: LoopState = self.backend.cond(refused(after), self._shortened, after)
        return shortened

    def _shortened(self, carry: LoopState) -> LoopState:
        return shortened(self.backend, self.solver, carry)

    def _stepped(self, carry: LoopState) -> LoopState:
        backend, xp = self.backend, self.backend.xp
        active = carry.status == int(Status.RUNNING)
        start = carry.z, carry.fz, masked(carry.state, active)
        result, residual, size = take_step(backend, self.solver, self.f, start, self.limits)
        state = result.state if result.frozen else freeze(backend, active, result.state, carry.state)
        kernels = backend.kernels
        updated = None if kernels is None else kernels.update(carry, result, residual, size, self.limits)
        if updated is not None:
            return updated._replace(state=state)
        size = backend.norm(result.fz) if size is None else size
        better, status, since, mark, peak = verdict(xp, self.limits, residual, size, carry.path)
        better = better & active
        z, fz = backend.select(active, result.z, carry.z), backend.select(active, result.fz, carry.fz)
        best = (
            backend.select(better, z, carry.best_z),
            backend.select(better, fz, carry.best_fz),
            xp.where(better, residual, carry.best_residual),
        )
        status = xp.where(active, status, carry.status)
        steps = carry.steps + xp.astype(active, xp.int32)
        return LoopState(
            z, fz, state, status, steps, *best, carry.reference, peak, mark, since, carry.length, carry.tried,
            carry.extra,
        )  # fmt: skip

    def ended(self, start: LoopState, end: LoopState) -> LoopState:
        """Return the loop state with the statuses of samples that have spent their budget."""
        backend = self.backend
        residual, size = residual_norms(backend, end.z, end.fz)
        left = spent(backend.xp, residual, size, end.path, end.steps - start.steps)
        return end._replace(status=backend.xp.where(end.status == int(Status.RUNNING), left, end.status))
