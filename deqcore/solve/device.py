"""The loop on devices where reading a number waits, and in traced code: every decision is an operation on arrays."""

from __future__ import annotations

from typing import Any

from deqcore.abc.backend import Backend
from deqcore.abc.solver import OpeningSolver, Solver, map_states
from deqcore.linear.norms import residual_norms
from deqcore.solve.step import freeze, masked, refused, shortened, take_step
from deqcore.solve.termination import spent, verdict
from deqcore.types import Array, Limits, LoopState, Map, Status, StepResult


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
        """Return the loop state after at most `steps` steps.

        Traced code takes them in stretches, each a loop of its own that ends when a step is refused, because a
        condition in a step would copy the iterate in each of them.
        """
        if not self.backend.capabilities.nested_loops:
            return self.advance(carry, steps, check_every)
        return self._stretches(carry, carry.steps, steps, check_every)

    def opened(self, opening: OpeningSolver, carry: LoopState, steps: int | Array, check_every: int | str) -> LoopState:
        """Return what `run` does, from a loop state with the solver state of `opening`, which takes the first steps."""
        before = carry.steps

        def continued(carry: LoopState) -> LoopState:
            return carry._replace(state=opening.continued(self.backend, carry.z, carry.fz, carry.state))

        def stretches(carry: LoopState) -> LoopState:
            return self._stretches(continued(carry), before, steps, check_every)

        carry = self._opening(opening, carry, steps, check_every)
        end: LoopState = self.backend.choose(self._due(carry, before, steps), stretches, continued, carry)
        return end

    def _due(self, carry: LoopState, before: Array, steps: int | Array) -> Array:
        """Return the samples `(batch,)` of bool that run and have taken fewer than `steps` steps more than `before`.

        A sample may wait while others take steps: it keeps its own budget.
        """
        return (carry.status == int(Status.RUNNING)) & (carry.steps - before < steps)

    def _stretches(self, start: LoopState, before: Array, steps: int | Array, check_every: int | str) -> LoopState:
        """Return the loop state after stretches of steps, `steps` of each sample since `before` `(batch,)` at most."""

        def goes_on(carry: LoopState) -> Array:
            return self._enough(self._due(carry, before, steps))

        def stretch(carry: LoopState) -> LoopState:
            return self._shortened(self._stretch(carry, before, steps, check_every))

        end: LoopState = self.backend.loop(goes_on, stretch, start, steps, 1)
        return end

    def advance(self, carry: LoopState, steps: int | Array, check_every: int | str) -> LoopState:
        """Return the loop state after at most `steps` steps in one loop."""
        end: LoopState = self.backend.loop(self.running, self.step, carry, steps, check_every)
        return end

    def _opening(
        self, opening: OpeningSolver, start: LoopState, steps: int | Array, check_every: int | str
    ) -> LoopState:
        """Return the loop state after steps of `opening`.

        It ends when a sample runs that the opening does not serve. While each iterate is the best so far, the loop
        carries it once. A step that is not better for some sample is left to the solver, which takes it again.
        """
        backend, xp = self.backend, self.backend.xp

        def parts(at: tuple[Array, LoopState]) -> tuple[Array, Array]:
            over, carry = at
            due = self._due(carry, start.steps, steps)
            served = due & opening.serves(backend, carry.state) & ~over
            return served, due & ~served

        def goes_on(at: tuple[Array, LoopState]) -> Array:
            served, waiting = parts(at)
            return xp.any(served) & ~xp.any(waiting)

        def step(at: tuple[Array, LoopState]) -> tuple[Array, LoopState]:
            (over, carry), (served, _) = at, parts(at)
            after = self._stepped(carry, opening, served)
            return over | ~xp.any(after.steps > carry.steps), after

        none = xp.sum(xp.zeros_like(start.steps)) > 0  # varies along the axes of a mesh as the loop state does
        begun = none, start._replace(best_z=None, best_fz=None)
        _, end = backend.loop(goes_on, step, begun, steps, check_every)
        return end._replace(best_z=end.z, best_fz=end.fz)

    def _stretch(self, start: LoopState, before: Array, steps: int | Array, check_every: int | str) -> LoopState:
        """Return the loop state after steps until one is refused.

        A loop may run on until its next check, or for another batch under vmap. The samples with a refused step wait.
        """

        def goes_on(carry: LoopState) -> Array:
            return self._enough(self._due(carry, before, steps)) & ~self.backend.xp.any(refused(carry))

        def step(carry: LoopState) -> LoopState:
            return self._stepped(carry, self.solver, self._due(carry, before, steps) & ~refused(carry))

        end: LoopState = self.backend.loop(goes_on, step, start, steps, check_every)
        return end

    def _enough(self, rows: Array) -> Array:
        """Return whether there are more of these samples `(batch,)` than may be spared."""
        xp = self.backend.xp
        none = isinstance(self.spare, int) and self.spare == 0
        enough: Array = xp.any(rows) if none else xp.sum(xp.astype(rows, xp.int32)) > self.spare
        return enough

    def running(self, carry: LoopState) -> Array | bool:
        """Return whether enough samples still run; on a device the same wait also reads whether steps were refused."""
        backend, xp = self.backend, self.backend.xp
        going = self._enough(carry.status == int(Status.RUNNING))
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
        after = self._stepped(carry, self.solver, carry.status == int(Status.RUNNING))
        if self.waits:
            return after
        shortened: LoopState = self.backend.cond(refused(after), self._shortened, after)
        return shortened

    def _shortened(self, carry: LoopState) -> LoopState:
        # A sample that has waited since is not active in the histories, which change active samples only.
        rows = refused(carry)
        return shortened(self.backend, self.solver, carry._replace(state=masked(carry.state, rows)))

    def _stepped(self, carry: LoopState, solver: Solver, active: Array) -> LoopState:
        """Return the loop state after a step of the samples `active` `(batch,)`."""
        backend, xp = self.backend, self.backend.xp
        start = carry.z, carry.fz, masked(carry.state, active)
        result, residual, size = take_step(backend, solver, self.f, start, self.limits)
        opens = isinstance(solver, OpeningSolver)
        kernels = None if opens else backend.kernels
        updated = None if kernels is None else kernels.update(carry, result, residual, size, self.limits)
        if updated is not None:
            return updated._replace(state=self._frozen(active, result, carry))
        size = backend.norm(result.fz) if size is None else size
        better, status, since, mark, peak = verdict(xp, self.limits, residual, size, carry.path)
        better = better & active
        if opens:  # all samples take the step, or none
            taken = xp.any(active) & ~xp.any(active & ~better)
            active, better = active & taken, better & taken
            state = map_states(
                lambda new, old: new if new is old or new.ndim else xp.where(taken, new, old), result.state, carry.state
            )
            result = result._replace(state=state)
        z, fz = backend.select(active, result.z, carry.z), backend.select(active, result.fz, carry.fz)
        return LoopState(
            z,
            fz,
            self._frozen(active, result, carry),
            xp.where(active, status, carry.status),
            carry.steps + xp.astype(active, xp.int32),
            None if opens else backend.select(better, z, carry.best_z),
            None if opens else backend.select(better, fz, carry.best_fz),
            xp.where(better, residual, carry.best_residual),
            carry.reference,
            xp.where(active, peak, carry.peak),
            xp.where(active, mark, carry.mark),
            xp.where(active, since, carry.since),
            carry.length,
            carry.tried,
            carry.extra,
        )

    def _frozen(self, active: Array, result: StepResult, carry: LoopState) -> Any:
        """Return the state of the solver after a step of the samples `active` `(batch,)`."""
        return result.state if result.frozen else freeze(self.backend, active, result.state, carry.state)

    def ended(self, start: LoopState, end: LoopState) -> LoopState:
        """Return the loop state with the statuses of samples that have spent their budget."""
        backend = self.backend
        residual, size = residual_norms(backend, end.z, end.fz)
        left = spent(backend.xp, residual, size, end.path, end.steps - start.steps)
        return end._replace(status=backend.xp.where(end.status == int(Status.RUNNING), left, end.status))
