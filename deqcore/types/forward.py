"""Records of a forward solve: when it stops, the state of its loop, its result."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from deqcore.types.arrays import Array


class StepResult(NamedTuple):
    """The result of a step.

    Attributes:
        z: the iterate `(batch, n)`.
        fz: f(z).
        state: the solver's state.
        size: ‖f(z)‖ `(batch,)`, or None if it has not been measured.
        frozen: the state of the samples that are not active is already unchanged.
        still: so is their z.
    """

    z: Array
    fz: Array
    state: Any
    size: Array | None = None
    frozen: bool = False
    still: bool = False


class Reached(NamedTuple):
    """Where a fixed number of recorded steps led.

    Attributes:
        z: the iterate, with its derivative `(batch, n)`.
        fz: f(z) `(batch, n)`, or None if it was not evaluated.
        evaluations: evaluations of f `(batch,)` int32.
        scale: scale of the start, max(‖z0‖, ‖f(z0)‖), `(batch,)`.
        residual: ‖f(z0) − z0‖ at the start `(batch,)`.
        unsettled: samples whose derivative is known not to be at its limit `(batch,)` of bool, or None.
        steps: steps taken `(batch,)` int32; None: the `steps` of the strategy.

    Example:
        >>> import numpy as np
        >>> one = np.ones(1)
        >>> Reached(np.ones((1, 2)), np.ones((1, 2)), np.ones(1, np.int32), scale=one, residual=one).z.tolist()
        [[1.0, 1.0]]
    """

    z: Array
    fz: Array
    evaluations: Array
    scale: Array
    residual: Array
    unsettled: Array | None = None
    steps: Array | None = None


class StoppingCriteria(NamedTuple):
    """When to stop. Numbers may be scalars of the framework: changing them then recompiles nothing.

    Attributes:
        rtol: a sample has converged when ‖f(z) − z‖ ≤ atol + rtol·‖f(z)‖, unless only because ‖f(z)‖ has grown.
        atol: see rtol.
        max_steps: step budget; 0 evaluates f once and reports.
        check_every: steps between host checks, or "auto".
        patience: steps without progress after which a sample counts as stalled.
        units: consecutive rows that f may couple: the units of one sample.
    """

    rtol: float | Array
    atol: float | Array = 0.0
    max_steps: int | Array = 40
    check_every: int | str = "auto"
    patience: int = 50
    units: int = 1


FINE: Final = 1e-5  # a dtype with an ε below it resolves residuals far below what growth explains


class Limits(NamedTuple):
    """The numbers that decide the status of samples. `rtol` and `atol` may be arrays; `atol` may be `(batch,)`.

    Attributes:
        rtol: relative tolerance.
        atol: absolute tolerance.
        patience: steps without progress after which a sample has stalled.
        slack: growth of the iterate, relative to the fall of the residual, up to which the tolerance is met.
        lost: unit roundoff of the state: a residual below this part of ‖f(z)‖ is rounding.
        hidden: the same, but 0 in dtypes that are too coarse to count it as residual.
        tiny: ‖f(z)‖ counts for at least this part of the start's scale.
    """

    rtol: Any
    atol: Any
    patience: int
    slack: Any
    lost: float
    hidden: float
    tiny: float

    @classmethod
    def of(cls, xp: Any, eps: float, rtol: Any, atol: Any, patience: int) -> Limits:
        """Return the limits for a state whose dtype has the machine epsilon `eps`."""
        least = min(1.0, max(0.1, 5.0 * eps**0.25))
        if isinstance(rtol, float):
            slack: Any = min(1.0, max(least, 8.0 * rtol**0.5))
        else:
            slack = xp.clip(8.0 * xp.sqrt(rtol), min=least, max=1.0)
        return cls(rtol, atol, patience, slack, 0.5 * eps, 0.5 * eps if eps < FINE else 0.0, eps**4)

    @property
    def relative(self) -> bool:
        """Whether the criterion needs ‖f(z)‖ at all."""
        return not (isinstance(self.rtol, float) and self.rtol == 0.0)


class Path(NamedTuple):
    """What is known of a sample's way so far, `(batch,)` each.

    Attributes:
        reference: scale of the start, max(‖z0‖, ‖f(z0)‖).
        peak: largest residual so far.
        best: least residual so far.
        mark: residual at the last progress.
        since: steps since then, or REFUSED or PENDING.
    """

    reference: Any
    peak: Any
    best: Any
    mark: Any
    since: Any


class LoopState(NamedTuple):
    """The state of the loop. All arrays have the batch as their first axis."""

    z: Array
    fz: Array
    state: Any
    status: Array
    steps: Array
    best_z: Array
    best_fz: Array
    best_residual: Array
    reference: Array  # scale of the start, max(‖z0‖, ‖f(z0)‖)
    peak: Array  # largest residual so far
    mark: Array  # residual at the last progress
    since: Array  # steps since then; REFUSED: f was not finite where the last step led; PENDING: not evaluated yet
    length: Array  # part of the residual that is tried after a refused step
    tried: Array  # least residual at the last refused step
    extra: Array  # evaluations of f beyond those that the solver counts: one for each time that the solve continued
    stale: Array = None  # coupled units: f(z) is from a point at which another unit of the sample was elsewhere

    @property
    def path(self) -> Path:
        """The part that the verdict reads."""
        return Path(self.reference, self.peak, self.best_residual, self.mark, self.since)


class SolveResult(NamedTuple):
    """The result of a solve, raveled: `z` and `fz` are `(batch, n)`, the rest `(batch,)`.

    A strategy that takes a fixed number of steps leaves no `carry`, and `fz` only if it evaluated f there.
    """

    z: Array
    fz: Any
    residual: Array
    status: Array
    steps: Array
    evaluations: Array
    carry: Any
