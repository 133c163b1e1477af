"""How a solve's residual falls, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from deqcore.api import fixed_point
from deqcore.config import Config
from deqcore.errors import ConfigError
from deqcore.types import Status, Tree


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
        """Steps after which each sample first had a relative residual of at most `rtol`, `(batch,)`; −1 if never."""
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
    """Solve one step at a time, as `fixed_point` would, and record every residual.

    Cost: that of the solve, and a copy of the solver's history and one more evaluation of f in every step. To look
    at a solver, not to train with. Not for traced code.

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
    fixed: dict[str, Any] = {"forward__on_failure": "ignore", "backward__strategy": "jacobian-free"}
    state, result, taken = None, [], None
    for step in range(steps + 1):
        budget = {"forward__max_steps": min(step, 1)}
        sol = fixed_point(f, z0, *args, config=config, state=state, **(overrides | fixed | budget))
        state = sol.state
        assert state is not None  # jacobian-free solves
        backend, carry = sol.backend, state.carry
        ends = (backend.to_numpy(backend.norm(a)).astype(np.float64) for a in (carry.fz - carry.z, carry.fz))
        result.append(_ratio(*ends))
        taken = backend.to_numpy(sol.steps)
        if not np.any(backend.to_numpy(sol.status) == int(Status.MAX_STEPS)):
            break  # all have met the tolerance, or failed
    return Curve(np.stack(result), taken)


def _ratio(a: Any, b: Any) -> Any:
    """Return a / b, and 0 where both vanish."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((a == 0) & (b == 0), 0.0, a / b)
