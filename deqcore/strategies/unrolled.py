"""Backpropagation through the solver's own steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deqcore.backend import Array, Backend, Map
from deqcore.driver import Forward, freeze, with_active
from deqcore.solver import Solver
from deqcore.strategy import StepStrategy


@dataclass(frozen=True)
class Unrolled(StepStrategy):
    """Run a fixed number of the solver's steps and differentiate through them.

    Exact for what was computed, which is the truncated iteration and not the fixed point; the reference for checks,
    and the usual way to pre-train. With the solver "picard" this is an ordinary weight-tied network. A sample stops
    where its residual reaches rounding (eps^¾): beyond, a quasi-Newton step divides rounding by rounding, and so does
    its derivative.

    Cost: `steps` + 1 recorded evaluations of f, whose memory is held unless `checkpoint` recomputes them.

    Args:
        steps: solver steps, at least 1.
        checkpoint: keep only the iterates and evaluate f again in the backward pass.

    Raises:
        ValueError: steps is below 1. From settings it is the ConfigError that names the setting.

    Source: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models", §3.1 (weight-tied baseline).

    Example:
        >>> import numpy as np, deqcore
        >>> z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, np.zeros((1, 1)), np.ones((1, 1)),
        ...                        cotangent=np.ones((1, 1)), forward__solver="picard",
        ...                        backward__strategy="unrolled", backward__options={"steps": 3})
        >>> z.round(6).tolist(), dx.round(6).tolist()  # f(f(f(f(0))))
        ([[1.875]], [[1.875]])
    """

    steps: int = 10
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps}, but at least 1 is expected")

    def solves(self) -> bool:
        """Nothing is solved for beside the recorded steps."""
        return False

    def value(self, backend: Backend, f: Map, z0: Array, forward: Forward | None, solver: Solver) -> Array:
        """F at the iterate after the last step."""
        run = backend.checkpoint(f) if self.checkpoint else f
        z = backend.detach(z0)
        fz = run(z)
        start = z, fz, solver.init(backend, z, fz)
        enough = backend.precision(z) ** 0.75

        def step(at: tuple[Array, Array, Any]) -> tuple[Array, Array, Any]:
            z, fz, state = at
            norm = backend.norm(backend.detach(fz))
            active = backend.norm(backend.detach(fz - z)) > enough * norm
            new_z, new_fz, new_state = solver.step(backend, run, z, fz, with_active(state, active))
            kept = with_active(freeze(backend, active, new_state, state), None)
            return backend.select(active, new_z, z), backend.select(active, new_fz, fz), kept

        value: Array = backend.repeat(step, start, self.steps)[1]
        return value
