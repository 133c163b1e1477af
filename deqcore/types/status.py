"""How a solve ends, in a code and in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final


class Status(IntEnum):
    """How a sample's solve ended. An int32 in traced code; `sentence` gives cause and remedy.

    Example:
        >>> import numpy as np, deqcore
        >>> sol = deqcore.fixed_point(np.cos, np.ones((1, 1)), forward__max_steps=2, forward__on_failure="ignore")
        >>> Status(int(sol.status[0])).name, Status.MAX_STEPS.sentence[:25]
        ('MAX_STEPS', 'The step budget was spent')
    """

    RUNNING = 0
    CONVERGED = 1
    MAX_STEPS = 2
    STALLED = 3
    DIVERGED = 4
    NONFINITE = 5
    FIXED_STEPS = 6

    @property
    def sentence(self) -> str:
        """Cause and remedy in one sentence."""
        return _SENTENCES[self].format(others=_listed(SEARCHING), damp="damp the step")

    def advice(self, solver: str = "") -> str:
        """Return the sentence without a recommendation of `solver`, the one in use (its name or its repr)."""
        used, _, options = solver.partition("(")
        others = [name for name in SEARCHING if name.replace("-", "") != used.replace("-", "").lower()]
        damp = "damp the step"
        if "max_residual_growth=None" in options:
            damp += " (forward.options.max_residual_growth = 2)"
        return _SENTENCES[self].format(others=_listed(others), damp=damp)


SEARCHING: Final = ("broyden", "anderson", "newton-krylov")  # solvers that work where plain iteration does not


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


_SENTENCES = {
    Status.RUNNING: "The solve has not ended.",
    Status.CONVERGED: "The residual met the tolerance.",
    Status.MAX_STEPS: (
        "The step budget was spent before the residual met the tolerance: raise forward.max_steps, loosen "
        "forward.rtol, or choose a solver that may need fewer steps ({others})."
    ),
    Status.STALLED: (
        "The residual stopped falling above the tolerance: it may be below what the dtype can reach (loosen "
        "forward.rtol or use a wider dtype), or the method is stuck (start elsewhere, or try another solver: {others})."
    ),
    Status.DIVERGED: (
        "The residual grew far above the scale of the start, or the iterate grew while its residual did not fall: f is "
        "not a contraction near here, or has no fixed point. Use {others}, {damp}, start closer, or regularise the "
        "Jacobian of f in training."
    ),
    Status.NONFINITE: (
        "f returned NaN or inf at the start, or wherever a step led, shorter steps included: the best finite iterate "
        "is returned. Start where f is finite, and look for overflow, a division by zero or a narrow dtype in f, or "
        "for NaN in its inputs and parameters."
    ),
    Status.FIXED_STEPS: (
        "The strategy takes a fixed number of steps, after which the residual was above the tolerance or was not "
        "measured (NaN): raise its own step count in backward.options, or choose a strategy that solves."
    ),
}
