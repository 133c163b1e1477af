"""The result of a solve: `Solution`, and its summary, one line per status."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.types import AdjointReport, Array, BackwardRecord, LoopState, Status, Tree


@dataclass(frozen=True)
class SolveState:
    """The state of a solve, to continue from with `fixed_point(..., state=sol.state)`, also after f has changed.

    A continued solve copies what it changes, so an estimate that a backward pass still needs stays unchanged.

    Attributes:
        carry: the state of the loop.
        solver: repr of the solver that made it; continuing with another solver is an error.
    """

    carry: LoopState
    solver: str


@dataclass(frozen=True)
class Solution:
    """The result of `fixed_point`.

    Attributes:
        value: the iterate z*, a tree like z0; carries gradients whenever the framework records them.
        residual: ‖f(z) − z‖ at `value` per sample, `(batch,)`; NaN if a strategy of fixed steps does not measure it.
            With `batch = 2` this and the following figures are those of each unit, `(batch, units)`.
        status: `Status` per sample, `(batch,)` int32.
        steps: solver steps per sample until it stopped, `(batch,)` int32.
        evaluations: evaluations of f per sample, `(batch,)` int32, without the one that records the gradient.
        state: to continue the solve, or None for strategies that do not solve (unrolled).
        backend: the backend of these arrays.
        record: filled in by the backward pass, see `backward`; None if there is none.
        z: the numbers of `value` without a gradient. It may share memory with `state` and z0: do not write to it.
        fz: f(z) without a gradient, or None where it was not evaluated.
        aux: with `has_aux = true`, what f returned in addition at `value`, with its gradient.
        mask: units that took part, in the shape of `status`, or None for all. The others have a residual of 0, no
            steps and no evaluations, and the summary does not count them.

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
    z: Tree = field(default=None, repr=False)
    fz: Tree | None = field(default=None, repr=False)
    aux: Tree = field(default=None, repr=False)
    mask: Array | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """Return the shapes of the value and the summary; where the statuses have no values (traced code), theirs."""
        leaves, _ = self.backend.flatten(self.value)
        shapes = ", ".join(str(tuple(getattr(leaf, "shape", ()))) for leaf in leaves)
        if self.backend.is_traced(self.status, self.residual, self.steps):
            return f"Solution(value of shape {shapes}, traced)"
        return f"Solution(value of shape {shapes})\n{self.summary()}"

    @property
    def converged(self) -> Array:
        """Whether each sample met its tolerance, `(batch,)` of bool."""
        return self.status == int(Status.CONVERGED)

    @property
    def backward(self) -> AdjointReport | None:
        """The report of the latest backward pass, per sample; None before it, and always in JAX (see adjoint_tap).

        With `batch = 2` its figures have the shape `(batch, units)`; `per_sample` says whether a sample's are equal.
        """
        report = self.record.report if self.record is not None else None
        if report is None or self.status.ndim == 1:
            return report
        shaped = {
            name: self.backend.xp.reshape(leaf, self.status.shape)
            for name, leaf in report._asdict().items()
            if leaf is not None
        }
        return report._replace(**shaped)

    def summary(self) -> str:
        """Return one readable line per status that occurs: how many samples, with figures, cause and remedy."""
        status: Any = self.backend.to_numpy(self.status)
        residual: Any = self.backend.to_numpy(self.residual)
        steps: Any = self.backend.to_numpy(self.steps)
        if self.mask is not None:
            status = np.where(self.backend.to_numpy(self.mask), status, MASKED)
        solver, noun = "" if self.state is None else self.state.solver, SAMPLES if status.ndim == 1 else UNITS
        return summarize(status.ravel(), residual.ravel(), steps.ravel(), solver, noun=noun)


SAMPLES: Final = "samples"
UNITS: Final = "units"
MASKED: Final = -1  # instead of a status, for a tally that does not count the unit
SOLVED: Final = "after at most {steps} steps, residual ‖f(z) − z‖ at most {residual:.3g}. {sentence}"


def failed(status: Array) -> Array:
    """Return which samples did not end as they should, `(batch,)` of bool: fixed steps have no tolerance to meet."""
    return (status != int(Status.CONVERGED)) & (status != int(Status.FIXED_STEPS))


class Tally(NamedTuple):
    """The counts of a batch: for each `Status`, the number of samples and their largest figures.

    Attributes:
        samples: number of samples, `(len(Status),)` int32.
        steps: the most steps (or vjps), `(len(Status),)` int32.
        residual: the largest residual, `(len(Status),)`; −inf for a status without samples.

    Example:
        >>> import numpy as np
        >>> Tally.of(np, np.array([1, 2, 2]), np.array([3, 9, 9]), np.array([1e-6, 0.5, 0.25])).samples.tolist()
        [0, 1, 2, 0, 0, 0, 0]
    """

    samples: Any
    steps: Any
    residual: Any

    @classmethod
    def of(cls, xp: Any, status: Any, steps: Any, residual: Any) -> Tally:
        """Count arrays `(batch,)` of the array namespace `xp`, with at least one sample."""
        rows = status[None, :] == xp.arange(len(Status))[:, None]
        return cls(
            xp.sum(xp.astype(rows, xp.int32), axis=1),
            xp.max(xp.where(rows, steps, xp.zeros_like(steps)), axis=1),
            xp.max(xp.where(rows, residual, xp.full_like(residual, -float("inf"))), axis=1),
        )

    def failed(self) -> Any:
        """Return whether any sample failed, see `failed`."""
        return self.samples.sum() > self.samples[int(Status.CONVERGED)] + self.samples[int(Status.FIXED_STEPS)]

    def notable(self) -> Any:
        """Return whether any sample failed; see `deqcore.types.Figures`."""
        return self.failed()

    def merged(self, xp: Any) -> Tally:
        """Return the tally of all lanes, from a stack of them; see `deqcore.types.Figures`."""
        return Tally(xp.sum(self.samples, axis=0), xp.max(self.steps, axis=0), xp.max(self.residual, axis=0))

    def lines(self, template: str, solver: str = "", *, failed_first: bool = False, noun: str = SAMPLES) -> str:
        """Return one line per status that occurs.

        Args:
            template: the rest of a line after "2 of 3 samples MAX_STEPS", with {steps}, {residual} and {sentence}.
            solver: the solver in use, which the sentences do not recommend.
            failed_first: begin with what failed, as a warning does.
            noun: of what is counted.
        """
        total, lines = int(self.samples.sum()), []
        for kind in sorted(Status, key=lambda kind: failed_first and kind is Status.CONVERGED):
            if count := int(self.samples[int(kind)]):
                steps, residual = int(self.steps[int(kind)]), float(self.residual[int(kind)])
                text = template.format(steps=steps, residual=residual, sentence=kind.advice(solver))
                lines.append(f"{count} of {total} {noun} {kind.name} {text}")
        return "\n".join(lines)


def summarize(
    status: Any, residual: Any, steps: Any, solver: str = "", *, failed_first: bool = False, noun: str = SAMPLES
) -> str:
    """Describe NumPy arrays `(batch,)` of status, residual and steps of `solver`, one line per status that occurs."""
    if not status.size:
        return "The batch is empty."
    lines = Tally.of(np, status, steps, residual).lines(SOLVED, solver, failed_first=failed_first, noun=noun)
    return lines or f"The mask leaves no {noun} to solve."
