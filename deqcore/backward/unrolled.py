"""Backpropagation through the solver's own steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.backward import StepStrategy
from deqcore.abc.solver import Solver, detach_state
from deqcore.linear.norms import residual_norms
from deqcore.solve.step import freeze, masked
from deqcore.solve.termination import greater
from deqcore.types import Array, Map, Reached, SolveResult


class _At(NamedTuple):
    """Between two steps.

    Attributes:
        z: the iterate `(batch, n)`.
        fz: f(z) `(batch, n)`.
        seen: z and f(z) as the solver's latest own step left them.
        state: the solver's.
        settled: samples whose residual has reached rounding `(batch,)` of bool.
        extra: evaluations of f beyond those that the solver counts `(batch,)` int32.
        stayed: samples that a chord step would have led away from the solution `(batch,)` of bool.
    """

    z: Array
    fz: Array
    seen: tuple[Array, Array]
    state: Any
    settled: Array
    extra: Array
    stayed: Array


@dataclass(frozen=True)
class Unrolled(StepStrategy):
    """Run a fixed number of the solver's steps and differentiate through them.

    Exact for what was computed, which is the truncated iteration and not the fixed point; the reference for checks,
    and the usual way to pre-train. With the solver "picard" this is an ordinary weight-tied network.

    A value may be there long before its derivative. Beyond rounding (a residual of eps^¾) a quasi-Newton step divides
    rounding by rounding, and so does its derivative. There the sample continues with chord steps (`Solver.chord`): they
    keep the value, and its derivative converges at the rate of the estimate.

    The residual is measured at the returned iterate. The status is CONVERGED where it meets the tolerance, and
    FIXED_STEPS where it does not: `steps` decides, and `forward.max_steps` is ignored. The status does not cover
    the derivative, which is not measured. In a direction in which f expands, the derivative of plain steps ("picard")
    grows while the value stays where it is. A solver without an estimate ("newton-krylov") continues with plain steps
    beyond rounding; where these lead away, its derivative is not at its limit, and the status is FIXED_STEPS.

    Cost: `steps` + 1 recorded evaluations of f, whose memory is held unless `checkpoint` recomputes them.

    Args:
        steps: solver steps, at least 1.
        checkpoint: keep only the iterates and evaluate f again in the backward pass.

    Raises:
        ValueError: steps is below 1. From settings it is the ConfigError that names the setting.

    Source: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models", §3.1 (weight-tied baseline); Kelley (1995),
    "Iterative Methods for Linear and Nonlinear Equations", §5.4.1 (chord method).

    Example:
        >>> import numpy as np, deqcore
        >>> z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, np.zeros((1, 1)), np.ones((1, 1)),
        ...                        cotangent=np.ones((1, 1)), forward__solver="picard",
        ...                        backward__strategy="unrolled", backward__options={"steps": 3})
        >>> z.round(6).tolist(), dx.round(6).tolist()  # f(f(f(0)))
        ([[1.75]], [[1.75]])
    """

    steps: int = 10
    checkpoint: bool = False
    causal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1 (got {self.steps}).")

    def solves(self) -> bool:
        """Return False: the recorded steps are the solve."""
        return False

    def value(self, backend: Backend, f: Map, z0: Array, forward: SolveResult | None, solver: Solver) -> Reached:
        """Return the iterate after the last step."""
        run = backend.autodiff.checkpoint(f) if self.checkpoint else f
        z = backend.detach(z0)
        fz = run(z)
        none = backend.norm(z) < 0
        zero = backend.xp.zeros_like(none, dtype=backend.xp.int32)
        start = _At(z, fz, (z, fz), solver.init(backend, z, fz), none, zero, none)
        end = backend.scan(lambda at: _step(backend, solver, run, at), start, self.steps)
        spent = solver.evaluations(backend, zero + self.steps, end.state) + end.extra
        residual, size = residual_norms(backend, z, backend.detach(fz))
        plain = solver.inverse_jacobian(backend, end.state) is None
        scale = greater(backend.xp, backend.norm(z), size)
        return Reached(end.z, end.fz, spent, scale, residual, end.stayed if plain else None)


def _step(backend: Backend, solver: Solver, f: Map, at: _At) -> _At:
    """Take a step of the solver, or a chord step for settled samples, in one evaluation of f."""
    settled = at.settled | _at_rounding(backend, at.z, at.fz)
    chord = None
    if not backend.known_all(~settled):
        chord = solver.chord(backend, at.z, at.fz, detach_state(backend, at.state))
    if chord is None:
        z, fz, state = solver.step(backend, f, at.z, at.fz, at.state)
        return _At(z, fz, (z, fz), state, at.settled, at.extra, at.stayed)
    if backend.known_all(settled):  # no sample is left whose step counts
        return _chord_step(backend, f, at._replace(settled=settled), chord)
    values: list[Array] = []

    def mixed(z: Array) -> Array:
        values.append(f(backend.select(settled, chord, z)))
        return values[-1]

    z, fz, state = solver.step(backend, mixed, *at.seen, masked(at.state, ~settled))
    state = masked(freeze(backend, ~settled, state, at.state), None)
    seen = backend.select(settled, at.seen[0], z), backend.select(settled, at.seen[1], fz)
    # A step that evaluates f several times may do so inside a traced loop, whose values stay there.
    once = solver.evaluations_per_step == 1 and type(solver).evaluations is Solver.evaluations
    value = values[0] if once else f(chord)
    extra = at.extra if once else at.extra + backend.xp.astype(settled, backend.xp.int32)
    kept = settled & ~_at_rounding(backend, chord, value)  # the estimate is not good enough there: stay
    z = backend.select(kept, at.z, backend.select(settled, chord, z))
    fz = backend.select(kept, at.fz, backend.select(settled, value, fz))
    return _At(z, fz, seen, state, settled, extra, at.stayed | kept)


def _chord_step(backend: Backend, f: Map, at: _At, chord: Array) -> _At:
    """Take a chord step of all samples; the solver's state stays."""
    value = f(chord)
    kept = ~_at_rounding(backend, chord, value)
    z, fz = backend.select(kept, at.z, chord), backend.select(kept, at.fz, value)
    return at._replace(z=z, fz=fz, stayed=at.stayed | kept)


def _at_rounding(backend: Backend, z: Array, fz: Array) -> Array:
    """Return which samples have a residual of the size of rounding, `(batch,)` of bool."""
    residual, size = backend.norm(backend.detach(fz - z)), backend.norm(backend.detach(fz))
    return residual <= backend.guards.output_eps(z) ** 0.75 * size
