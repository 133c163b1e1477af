"""The state of the solver `auto`, and how parts of it change."""

from __future__ import annotations

from typing import NamedTuple

from deqcore.abc.backend import Backend
from deqcore.solvers.anderson import AndersonState
from deqcore.solvers.levels import Progress
from deqcore.solvers.newton_krylov import NewtonState
from deqcore.types import Array


class AutoState(NamedTuple):
    """The state of Auto.

    Attributes:
        memory: differences of the accelerated samples; its residual is empty `(batch, 0)`, because f(z) and z give it.
        progress: what the rules know.
        newton: forcing terms and products of Newton–Krylov.
        size: ‖f(z)‖ `(batch,)`.
    """

    memory: AndersonState
    progress: Progress
    newton: NewtonState
    size: Array


class Moved(NamedTuple):
    """The point of a step, f there, and the figures of Newton–Krylov after it."""

    z: Array
    fz: Array
    newton: NewtonState


def skipped(memory: AndersonState, steps: int | Array = 1) -> AndersonState:
    """Return the memory after steps in which no sample stores a difference."""
    return memory._replace(values=memory.values.skip(steps), residuals=memory.residuals.skip(steps))


def kept(backend: Backend, rows: Array, new: AndersonState, old: AndersonState) -> AndersonState:
    """Return the state `new` with the small arrays of `old` beside `rows`."""
    where = backend.xp.where
    return new._replace(
        system=where(rows[:, None, None], new.system, old.system),
        scale=where(rows[:, None], new.scale, old.scale),
        target=where(rows[:, None], new.target, old.target),
        step=where(rows[:, None], new.step, old.step),
    )
