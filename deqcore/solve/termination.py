"""Termination of a sample: the criterion, the verdict after each step, and the handling of refused steps.

Everything is per sample, and scale-invariant: s·f(z/s) from s·z0 ends after the same steps with the same status.

**Criterion.** ‖f(z) − z‖ ≤ atol + rtol·‖f(z)‖, where ‖f(z)‖ counts for no less than ε⁴ times the scale of the start,
max(‖z0‖, ‖f(z0)‖), so that an equilibrium at 0 can be met. A large iterate does not satisfy it: once ‖f(z)‖ exceeds
the scale of the start, the residual must have fallen from its largest value by more than the iterate has grown. The
residual counts for no less than the rounding of f(z), as f(z) = z + 1 returns z itself where z is large enough.

**Refused steps.** If f is not finite at the point of a step, the sample returns to its best iterate and tries a
shorter step along the residual there, with a solver that is reset for this sample.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from deqcore.types import Limits, Path, Status

BLOW_UP: Final = 1e-6  # a residual counts as divergence if this part of it exceeds the scale of the start
PROGRESS: Final = 0.999  # a residual must fall below this part of the last mark within `patience` steps
REFUSED: Final = -1  # in `since`: f was not finite at the result of the step
PENDING: Final = -2  # in `since`: f has not been evaluated yet at the point to try after it
SHORTER: Final = 0.25  # of the part of the residual that was tried before, where the iterate has not become better
SHORTEST: Final = 2.0**-10  # part of the residual that is tried after a refused step, at least
IDLE: Final = 10  # steps without progress, at least, after which the end of the budget is a stall
FAR: Final = 10.0  # growth over fall of the residual that is an escape, at the end of the budget
LOST: Final = 0.25  # part of its largest value that the residual's rounding may make up
FALL: Final = 100.0  # a residual this much below its largest value has fallen whatever the iterate is
DROP: Final = 6.0  # if it did so by such a fall in one step; Newton nears a zero of z^-p at infinity by e at most


class Verdict(NamedTuple):
    """`better`: the iterate is the best so far. The others as in `Path` and `Status`."""

    better: Any
    status: Any
    since: Any
    mark: Any
    peak: Any


def greater(xp: Any, a: Any, b: Any) -> Any:
    """Return the greater of two numbers; `b` where `a` is NaN."""
    return xp.where(a > b, a, b)


def goal(xp: Any, limits: Limits, size: Any, reference: Any) -> Any:
    """Return the largest residual that converges, growth aside. `size` is ‖f(z)‖, or None if rtol is 0."""
    if size is None or not limits.relative:
        return limits.atol
    relative = limits.rtol * greater(xp, size, limits.tiny * reference)
    return relative if isinstance(limits.atol, float) and limits.atol == 0.0 else limits.atol + relative


def grown(xp: Any, residual: Any, size: Any, reference: Any, peak: Any) -> Any:
    """Return the growth of the iterate over the fall of the residual, by quotients, because products overflow."""
    scale = greater(xp, peak, reference)
    return (residual / xp.where(peak > 0.0, peak, 1.0)) * (size / xp.where(scale > 0.0, scale, 1.0))


def judged(xp: Any, limits: Limits, residual: Any, size: Any, reference: Any, peak: Any, mark: Any) -> tuple[Any, Any]:
    """Return whether the tolerance is met, and whether only the growth of the iterate meets it, `(batch,)` of bool."""
    near = residual <= goal(xp, limits, size, reference)
    settled = near & (size <= reference)
    if xp is np and (settled == near).all():  # as in most steps: nothing has grown
        return near, near & ~near
    lost, hidden = limits.lost * size, limits.hidden * size
    # A residual not below an earlier one that did not converge meets the tolerance by growth alone.
    proven = (residual < mark) & (grown(xp, greater(xp, residual, hidden), size, reference, peak) <= limits.slack)
    resolved = lost <= LOST * peak
    at_start = (size <= 2.0 * reference) & (residual <= limits.atol + limits.rtol * reference)
    absolute = greater(xp, residual, lost) <= limits.atol
    # A residual far below its largest value, by one large fall, which no way to infinity shows.
    least = greater(xp, residual, lost)
    bottom = (FALL * least <= peak) & (DROP * least <= mark)
    met = settled | (near & (at_start | absolute | (resolved & (proven | bottom))))
    return met, near & ~met & ~resolved


def verdict(xp: Any, limits: Limits, residual: Any, size: Any, path: Path) -> Verdict:
    """Return the verdict on an iterate with this residual and ‖f(z)‖, `(batch,)` each."""
    met, escaped = judged(xp, limits, residual, size, path.reference, path.peak, path.mark)
    finite = xp.isfinite(residual)
    sane = BLOW_UP * residual <= path.reference  # False for NaN, too
    better = ((residual < path.best) & (limits.lost * size <= LOST * path.peak)) | (met & sane)
    progress = residual < PROGRESS * path.mark
    since = xp.where(progress, 0, xp.where(path.since < 0, 0, path.since) + 1)
    status = xp.astype(met, xp.int32) * int(Status.CONVERGED)
    status = xp.where(met | (since < limits.patience), status, int(Status.STALLED))
    status = xp.where(sane & ~escaped, status, int(Status.DIVERGED))
    return Verdict(
        better=better,
        status=xp.where(finite, status, 0),
        since=xp.where(finite, since, REFUSED),
        mark=xp.where(progress, residual, path.mark),
        peak=xp.where(sane & (residual > path.peak), residual, path.peak),
    )


def spent(xp: Any, residual: Any, size: Any, path: Path, steps: Any) -> Any:
    """Return the status `(batch,)` int32 of samples whose step budget is spent, after `steps` in all.

    More steps do not help a sample that has made no progress in the second half of its steps. It has diverged if it
    has grown while its residual has not fallen, and stalled otherwise.
    """
    idle = (2 * path.since > steps) & (path.since >= IDLE)
    away = grown(xp, residual, size, path.reference, path.peak) > FAR
    status = xp.full_like(path.since, int(Status.MAX_STEPS))
    status = xp.where(idle, xp.where(away, xp.full_like(status, int(Status.DIVERGED)), int(Status.STALLED)), status)
    return xp.where(path.since < 0, int(Status.NONFINITE), status)
