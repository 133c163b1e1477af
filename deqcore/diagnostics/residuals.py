"""How a solve's residual falls, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.solver import Solver
from deqcore.config import Config
from deqcore.errors import ConfigError
from deqcore.linear.norms import residual_norms
from deqcore.solve.dispatch import plan_call
from deqcore.solve.loop import BoundSolve
from deqcore.solve.step import fused_step
from deqcore.types import Array, Map, Tree


@dataclass(frozen=True)
class Curve:
    """Residuals of a solve; NumPy arrays on the host.

    Attributes:
        residual: ‖f(z) − z‖ / ‖f(z)‖ at each iterate, the initial one first, `(steps + 1, batch)`. A sample that has
            stopped keeps its last value.
        steps: steps that each sample took until it stopped, `(batch,)`.

    Example:
        >>> import numpy as np
        >>> from deqcore.diagnostics import residual_curve
        >>> curve = residual_curve(lambda z: 0.5 * z + 1.0, np.zeros((1, 1)), steps=12, forward__solver="picard")
        >>> curve.steps_to(1e-2).tolist(), curve.rate().round(1).tolist()
        ([6], [0.5])
    """

    residual: Any
    steps: Any

    def rate(self) -> Any:
        """Return the mean factor per step over the second half of each sample's steps, `(batch,)`; NaN below two steps.

        Below 1 the solve converges, and a plain iteration's rate tends to the spectral radius.
        """
        result = np.full(self.residual.shape[1:], np.nan)
        for i, steps in enumerate(self.steps):
            middle = int(steps) // 2
            if steps >= 2 and self.residual[middle, i] > 0:
                result[i] = (self.residual[int(steps), i] / self.residual[middle, i]) ** (1 / (int(steps) - middle))
        return result

    def steps_to(self, rtol: float) -> Any:
        """Return the steps until each sample's relative residual was at most `rtol`, `(batch,)`; −1 if it never was."""
        met = self.residual <= rtol
        return np.where(met.any(axis=0), met.argmax(axis=0), -1)


def residual_curve(
    f: Callable[..., Tree],
    z0: Tree,
    *args: Any,
    steps: int = 40,
    config: Config | None = None,
    **overrides: Any,
) -> Curve:
    """Solve as `fixed_point` would, and record every residual.

    A step to where f is not finite is recorded as NaN or inf.

    Cost: that of the solve and two norms a step. f is evaluated as often as in the solve.

    Args:
        f: as in `fixed_point`.
        z0: as in `fixed_point`.
        *args: as in `fixed_point`.
        steps: at most.
        config: as in `fixed_point`; its step budget does not count.
        **overrides: as in `fixed_point`, as in `forward__solver="anderson"`.

    Returns:
        Residuals `(steps + 1, batch)`, relative to ‖f(z)‖, see `Curve`.

    Raises:
        ConfigError: steps is negative. Otherwise as `fixed_point`.

    Example:
        >>> import numpy as np
        >>> found = residual_curve(lambda z: 0.5 * z + 1, np.zeros((1, 1)), forward__solver="picard", steps=20)
        >>> found.rate().round(2).item(), found.steps_to(0.1).item()
        (0.5, 3)
    """
    if steps < 0:
        raise ConfigError.bad_value("residual_curve", "steps", steps, "at least 0")
    fixed = {"forward__max_steps": steps, "forward__compact": False, "backward__strategy": "jacobian-free"}
    plan = plan_call(config, overrides | fixed, z0, args)
    backend = plan.backend
    solve = BoundSolve(backend, _Recorded(plan.solver, steps), plan.control)
    result = backend.autodiff.forward_only(plan.space.wrap(f, ()), plan.space.ravel(z0), args, solve)
    taken = backend.to_numpy(result.steps)
    last = int(taken.max(initial=0))
    return Curve(backend.to_numpy(result.carry.state.curve).astype(np.float64).T[: last + 1], taken)


class _Recording(NamedTuple):
    """The solver's own state, the relative residuals so far `(batch, steps + 1)` and the steps taken `(batch,)`."""

    inner: Any
    curve: Array
    taken: Array


@dataclass(frozen=True)
class _Recorded(Solver):
    """`solver`, with the residuals of `steps` steps in its state. The columns not reached hold the latest one."""

    solver: Solver
    steps: int

    def init(self, backend: Backend, z: Array, fz: Array) -> _Recording:
        """Start with the first residual in all columns."""
        ratio = _ratio(backend, z, fz)
        curve = ratio[:, None] + backend.xp.zeros_like(self._columns(backend, ratio))[None, :]
        taken = backend.xp.zeros_like(ratio, dtype=backend.xp.int32)
        return _Recording(self.solver.init(backend, z, fz), curve, taken)

    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: _Recording) -> tuple[Array, Array, _Recording]:
        """Take the solver's own step, fused where the backend fuses it, and record its residual."""
        fused = fused_step(backend, self.solver, f, z, fz, state.inner)
        z, fz, inner = fused[:3] if fused is not None else self.solver.step(backend, f, z, fz, state.inner)
        ratio, taken = _ratio(backend, z, fz), state.taken + 1
        rest = self._columns(backend, ratio)[None, :] >= backend.cast(taken, ratio)[:, None]
        return z, fz, _Recording(inner, backend.xp.where(rest, ratio[:, None], state.curve), taken)

    def restarted(self, backend: Backend, rows: Array, z: Array, state: _Recording) -> _Recording:
        """Restart the solver and keep the record."""
        return state._replace(inner=self.solver.restarted(backend, rows, z, state.inner))

    def residual_norm(self, backend: Backend, state: _Recording) -> Array | None:
        """Return the residual norm as the solver measured it."""
        return self.solver.residual_norm(backend, state.inner)

    def evaluations(self, backend: Backend, steps: Array, state: _Recording) -> Array:
        """Return the evaluations as the solver counts them."""
        return self.solver.evaluations(backend, steps, state.inner)

    def _columns(self, backend: Backend, like: Array) -> Array:
        return backend.asarray(np.arange(self.steps + 1), like=like)


def _ratio(backend: Backend, z: Array, fz: Array) -> Array:
    """‖f(z) − z‖ / ‖f(z)‖ of each row, and 0 where both vanish."""
    xp = backend.xp
    residual, size = residual_norms(backend, z, fz)
    nothing = (residual == 0) & (size == 0)
    return residual / xp.where(nothing, xp.ones_like(size), size)
