"""The plain steps of the solver `auto`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.scaling import row_scale
from deqcore.abc.solver import OpeningSolver
from deqcore.linear.norms import residual_norms
from deqcore.solvers.anderson import Anderson
from deqcore.solvers.auto_state import AutoState, skipped
from deqcore.solvers.levels import PLAIN, Progress, Rules, progressed
from deqcore.solvers.newton_krylov import NewtonKrylov, NewtonState
from deqcore.types import Array, Map


class PlainState(NamedTuple):
    """The state of plain samples.

    Attributes:
        progress: what the rules know.
        size: ‖f(z)‖ `(batch,)`.
        unit: that of `AndersonState`.
        taken: steps so far, a scalar int32.
    """

    progress: Progress
    size: Array
    unit: Array | None
    taken: Array


@dataclass(frozen=True)
class PlainSteps(OpeningSolver):
    """Steps z₊ = f(z) under the rules of `Auto`, for a batch in which no sample has accelerated.

    Args:
        rules: the numbers of the rules.
        anderson: the method of accelerated samples, whose state `continued` begins.
        newton: that of the last resort.
    """

    rules: Rules
    anderson: Anderson
    newton: NewtonKrylov

    def init(self, backend: Backend, z: Array, fz: Array) -> PlainState:
        """Return the state of a batch of plain samples."""
        progress, size, unit = measured(backend, z, fz)
        return PlainState(progress, size, unit, backend.xp.astype(backend.xp.sum(progress.level), backend.xp.int32))

    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: PlainState) -> tuple[Array, Array, PlainState]:
        """Take a plain step with all samples."""
        none = backend.xp.zeros_like(state.progress.level)
        # Constants for what is true of all samples served: compiled code then leaves out the rules of the others.
        before = state.progress._replace(level=none, rate=backend.xp.zeros_like(state.progress.rate))
        z, fz, progress, size = plain_step(backend, self.rules, f, (z, fz, before, state.size))
        return z, fz, PlainState(progress, size, state.unit, state.taken + 1)

    def serves(self, backend: Backend, state: PlainState) -> Array:
        """Return the samples that have not accelerated."""
        return state.progress.level == PLAIN

    def continued(self, backend: Backend, z: Array, fz: Array, state: PlainState) -> AutoState:
        """Return the state of `Auto` with empty histories, whose next slot is that of the next step."""
        begun = self.begun(backend, fz, state.progress, state.size, state.unit)
        return begun._replace(memory=skipped(begun.memory, state.taken))

    def begun(self, backend: Backend, fz: Array, progress: Progress, size: Array, unit: Array | None) -> AutoState:
        """Return the state of `Auto` with empty histories, from the parts of a `PlainState`."""
        memory = self.anderson.begun(backend, fz, progress.norm, unit)
        forcing = backend.xp.full_like(backend.to_accum_dtype(progress.norm), self.newton.forcing)
        newton = NewtonState(forcing, backend.xp.zeros_like(progress.level))
        return AutoState(memory, progress, newton, size)

    def residual_norm(self, backend: Backend, state: PlainState) -> Array:
        """Return the norm that the rules have read."""
        return state.progress.norm

    def output_norm(self, backend: Backend, state: PlainState) -> Array:
        """Return the norm that was measured with it."""
        return state.size


def measured(backend: Backend, z: Array, fz: Array) -> tuple[Progress, Array, Array | None]:
    """Return the progress before the first step, ‖f(z)‖ and the unit of the histories."""
    xp = backend.xp
    norm, size = residual_norms(backend, z, fz)
    none = xp.zeros_like(norm, dtype=xp.int32)
    return Progress(none, norm, norm, norm, none, xp.zeros_like(norm)), size, row_scale(backend, norm, fz)


def plain_step(
    backend: Backend,
    rules: Rules,
    f: Map,
    start: tuple[Array, Array, Progress, Array],
    active: Array | None = None,
) -> tuple[Array, Array, Progress, Array]:
    """Return z, f(z), the progress and ‖f(z)‖ after a plain step of all samples.

    A sample that refuses the step stays where it was, and accelerates next.

    Args:
        backend: the backend of these arrays.
        rules: the numbers of the rules.
        f: the map.
        start: z, f(z), the progress and ‖f(z)‖ before the step.
        active: see `deqcore.solvers.levels.progressed`.
    """
    z, fz, before, size_before = start
    value = f(fz)
    norm, size = residual_norms(backend, fz, value)
    progress, refused = progressed(backend, rules, norm, before, active)
    if refused is None:
        return fz, value, progress, size
    size = backend.xp.where(refused, size_before, size)
    return backend.select(refused, z, fz), backend.select(refused, fz, value), progress, size
