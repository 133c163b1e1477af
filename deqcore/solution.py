"""What a solve returns: `Solution`, and `Status` as an integer for code and a sentence for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final

from deqcore.backend import Array, Backend, BackwardRecord, Tree

if TYPE_CHECKING:
    from deqcore.driver import Carry
    from deqcore.strategy import AdjointReport


class Status(IntEnum):
    """How a sample's solve ended. An int32 in traced code; `sentence` says cause and remedy.

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

    @property
    def sentence(self) -> str:
        """Cause and remedy in one sentence."""
        return _SENTENCES[self].format(others=_listed(SEARCHING), damp="damp the step")

    def advice(self, solver: str = "") -> str:
        """The sentence for who uses `solver` (a name, or the repr of a solver), which it does not recommend."""
        used, _, options = solver.partition("(")
        others = [name for name in SEARCHING if name.replace("-", "") != used.replace("-", "").lower()]
        damp = "damp the step (forward.options.growth = 2)" if "growth=None" in options else "damp the step"
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
}


@dataclass(frozen=True)
class SolveState:
    """Where a solve stands, to continue it with `fixed_point(..., state=sol.state)`.

    Sealed: continuing copies what it changes, so an estimate that a backward pass still needs stays as it is.

    Attributes:
        carry: the driver's loop state.
        solver: repr of the solver that made it; continuing with another one is an error.
    """

    carry: Carry
    solver: str


@dataclass(frozen=True)
class Solution:
    """The result of `fixed_point`.

    Attributes:
        value: f(z*), a tree like z0; carries gradients whenever the framework records them.
        residual: ‖f(z) − z‖ of the returned iterate per sample, `(batch,)`.
        status: `Status` per sample, `(batch,)` int32.
        steps: solver steps per sample until it stopped changing, `(batch,)` int32.
        evaluations: evaluations of f per sample, `(batch,)` int32, without the one that records the gradient.
        state: to continue the solve, or None for strategies that do not solve (unrolled).
        backend: whose arrays these are.
        record: filled in by the backward pass, see `backward`; None if there is none.

    Example:
        >>> import numpy as np, deqcore
        >>> sol = deqcore.fixed_point(np.cos, np.ones((2, 1)), forward__rtol=1e-8)
        >>> sol.value.round(6).tolist(), sol.converged.tolist(), sol.steps.shape
        ([[0.739085], [0.739085]], [True, True], (2,))
    """

    value: Tree
    residual: Array
    status: Array
    steps: Array
    evaluations: Array
    state: SolveState | None = field(repr=False)
    backend: Backend = field(repr=False)
    record: BackwardRecord | None = field(default=None, repr=False)

    @property
    def converged(self) -> Array:
        """Whether each sample met its tolerance, `(batch,)` of bool."""
        return self.status == int(Status.CONVERGED)

    @property
    def backward(self) -> AdjointReport | None:
        """What the latest backward pass did, per sample; None before it ran (and always in JAX, see the probe)."""
        return self.record.report if self.record is not None else None

    def summary(self) -> str:
        """A few lines for people: how many samples ended how, with numbers, cause and remedy."""
        status: Any = self.backend.to_numpy(self.status)
        residual: Any = self.backend.to_numpy(self.residual)
        steps: Any = self.backend.to_numpy(self.steps)
        return summarize(status, residual, steps, "" if self.state is None else self.state.solver)


def summarize(status: Any, residual: Any, steps: Any, solver: str = "") -> str:
    """Describe NumPy arrays `(batch,)` of status, residual and steps of `solver`, one line per status that occurs."""
    lines = []
    for kind in Status:
        rows = status == int(kind)
        if rows.any():
            lines.append(
                f"{int(rows.sum())} of {status.size} samples {kind.name} after at most {int(steps[rows].max())} "
                f"steps, residual ‖f(z) − z‖ at most {float(residual[rows].max()):.3g}. {kind.advice(solver)}"
            )
    return "\n".join(lines) or "The batch is empty."
