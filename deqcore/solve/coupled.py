"""The loop for units that f couples, such as the tokens of a sequence under attention.

Each unit has its own row: its steps, history, residual and status are its own. f alone carries numbers from one unit
to another, so these rules come on top of those of `deqcore.solve.device`:

- f is evaluated at one point per sample. Units that have stopped stay in it where they stopped, and the same
  evaluation measures their residuals again.
- A unit that had converged runs again, with a fresh solver state, once the others have moved its residual above the
  tolerance. So all units of a sample that end as CONVERGED are within tolerance at one point, the one returned.
- The returned point is the last one at which f was finite, and not the best of each unit, because units that are best
  at different steps make no common point. A choice by the whole sample would let a later unit decide about an earlier
  one: with a causal f every number of a unit depends on itself and on the units before it alone.
"""

from __future__ import annotations

from deqcore.abc.backend import Backend
from deqcore.abc.solver import Solver
from deqcore.linear.norms import residual_norms
from deqcore.solve.device import DeviceLoop
from deqcore.solve.step import advance, freeze, masked, merge
from deqcore.solve.termination import goal, greater, verdict
from deqcore.types import Array, Limits, LoopState, Map, Status


class CoupledLoop(DeviceLoop):
    """The loop of `DeviceLoop` for coupled units. On devices it waits in each step, to see whether a unit resumes.

    Args:
        backend: the backend of the arrays.
        solver: the method, as `Solver.for_coupled_units` returns it.
        f: the map on `(batch, n)`.
        limits: of the verdict.
        units: consecutive rows that belong to one sample.
    """

    def __init__(self, backend: Backend, solver: Solver, f: Map, limits: Limits, units: int) -> None:
        super().__init__(backend, solver, f, limits)
        self.units = units

    def begun(self, carry: LoopState) -> LoopState:
        """Return the loop state before the first step of this loop."""
        return carry._replace(stale=self.backend.xp.zeros_like(carry.status) > 0)

    def run(self, carry: LoopState, steps: int | Array, check_every: int | str) -> LoopState:
        """Return the loop state after at most `steps` steps."""
        return self.advance(carry, steps, check_every)

    def _stepped(self, carry: LoopState, solver: Solver, active: Array) -> LoopState:
        backend, xp = self.backend, self.backend.xp
        together = self._anywhere(active)  # samples in which any unit runs; the others are final

        def at(point: Array) -> Array:
            return self.f(backend.select(active, point, carry.z))

        result = advance(backend, solver, at, (carry.z, carry.fz, masked(carry.state, active)))
        state = result.state if result.frozen else freeze(backend, active, result.state, carry.state)
        z = backend.select(active, result.z, carry.z)
        residual, size = self._measured(z, result.fz)
        finite = xp.isfinite(residual)
        seen = together & finite
        judged = verdict(xp, self.limits, residual, size, carry.path)
        held = (carry.status == int(Status.CONVERGED)) & seen
        resumed = held & (residual > goal(xp, self.limits, size, carry.reference))
        status = xp.where(active, judged.status, carry.status)
        back = active & xp.all(result.z == carry.z, axis=1)  # a refused step: the others saw where it led
        after = LoopState(
            z=z,
            fz=backend.select(active | seen, result.fz, carry.fz),
            state=state,
            status=xp.where(resumed, xp.zeros_like(status), status),
            steps=carry.steps + xp.astype(active, xp.int32),
            best_z=backend.select(seen, z, carry.best_z),
            best_fz=backend.select(seen, result.fz, carry.best_fz),
            best_residual=xp.where(seen, residual, carry.best_residual),
            reference=xp.where(resumed, greater(xp, size, carry.reference), carry.reference),
            peak=xp.where(active, judged.peak, xp.where(resumed, greater(xp, residual, carry.peak), carry.peak)),
            mark=xp.where(active, judged.mark, xp.where(resumed, residual, carry.mark)),
            since=xp.where(active, judged.since, xp.where(resumed, xp.zeros_like(carry.since), carry.since)),
            length=carry.length,
            tried=carry.tried,
            extra=carry.extra,
            stale=xp.where(together, self._anywhere(back), carry.stale),
        )
        renewed: LoopState = backend.cond(resumed, lambda carry: self._renewed(carry, resumed), after)
        return renewed

    def _renewed(self, carry: LoopState, rows: Array) -> LoopState:
        """Give units that run again the state of a start: their differences belong to other places of the others."""
        fresh = self.solver.init(self.backend, carry.z, carry.fz)
        return carry._replace(state=merge(self.backend, rows, fresh, carry.state))

    def _shortened(self, carry: LoopState) -> LoopState:
        """See `DeviceLoop`; a unit that is given up returns to where f was finite: the others continue."""
        carry = super()._shortened(carry)
        lost = carry.status == int(Status.NONFINITE)
        select = self.backend.select
        return carry._replace(z=select(lost, carry.best_z, carry.z), fz=select(lost, carry.best_fz, carry.fz))

    def ended(self, start: LoopState, end: LoopState) -> LoopState:
        """See `DeviceLoop`; units of a sample that has failed are measured once more if they were not seen together."""
        end = super().ended(start, end)
        failed = self._anywhere(end.status != int(Status.CONVERGED))
        rows = end.stale & failed
        together: LoopState = self.backend.cond(rows, lambda carry: self._together(carry, rows), end)
        return together

    def _together(self, carry: LoopState, rows: Array) -> LoopState:
        """Measure the units `rows` at the point that is returned, and judge them there."""
        backend, xp = self.backend, self.backend.xp
        fz = self.f(carry.best_z)
        residual, size = self._measured(carry.best_z, fz)
        rows_seen = rows & xp.isfinite(residual)
        met = residual <= goal(xp, self.limits, size, carry.reference)
        was = (carry.status == int(Status.CONVERGED)) | (carry.status == int(Status.MAX_STEPS))
        now = xp.where(met, xp.full_like(carry.status, int(Status.CONVERGED)), int(Status.MAX_STEPS))
        return carry._replace(
            best_fz=backend.select(rows_seen, fz, carry.best_fz),
            best_residual=xp.where(rows_seen, residual, carry.best_residual),
            status=xp.where(rows_seen & was, now, carry.status),
            extra=carry.extra + xp.astype(rows, xp.int32),
        )

    def _measured(self, z: Array, fz: Array) -> tuple[Array, Array]:
        """Return ‖f(z) − z‖ and ‖f(z)‖ `(batch,)`."""
        residual, size = residual_norms(self.backend, z, fz)
        return residual, self.backend.norm(fz) if size is None else size

    def _anywhere(self, rows: Array) -> Array:
        """Return whether any unit of the same sample is among `rows` `(batch,)`."""
        xp = self.backend.xp
        samples = xp.reshape(rows, (rows.shape[0] // self.units, self.units))
        return xp.reshape(samples | xp.any(samples, axis=1, keepdims=True), rows.shape)
