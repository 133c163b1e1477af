"""The levels of the solver `auto`: when a sample moves up, and when it refuses a step. Residuals and counts only."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.types import Array

PLAIN: Final = 0
ACCELERATED: Final = 1
NEWTON: Final = 2
HALVED: Final = 0.5  # part of the residual at the last progress that counts as progress
FASTER: Final = 1.4  # acceleration pays if it gains this many plain steps a step
GROWN: Final = 2.0  # growth of the residual in the first step that does not accelerate the sample
NEVER: Final = 1.0  # as a plain step's contraction: the sample stays accelerated


class Progress(NamedTuple):
    """What the rules know of each sample, `(batch,)` each.

    Attributes:
        level: PLAIN, ACCELERATED or NEWTON, int32.
        norm: ‖g‖ of the current iterate.
        best: least ‖g‖ so far.
        mark: ‖g‖ at the last progress; for a plain sample that of the iterate before.
        since: steps since then, int32, of which a refused one counts for several; for a plain sample its steps
        rate: what a plain step left of ‖g‖ before the sample accelerated; 0 if it never did, NEVER after the trial.
    """

    level: Array
    norm: Array
    best: Array
    mark: Array
    since: Array
    rate: Array


class Rules(NamedTuple):
    """The numbers of the rules: options of `Auto`, whether a sample may reach NEWTON, and the steps of the trial."""

    slow: float
    plain_steps: int
    patience: int
    max_residual_growth: float
    escalates: bool
    trial: int


def progressed(
    backend: Backend, rules: Rules, norm: Array, old: Progress, active: Array | None
) -> tuple[Progress, Array | None]:
    """Return the progress after a step, and which samples refuse it; None if surely none does.

    Args:
        backend: the backend of these arrays.
        rules: the numbers of the rules.
        norm: ‖g‖ after the step `(batch,)`.
        old: the progress before it.
        active: samples that have not stopped `(batch,)` of bool, None for all. Where reading numbers costs no wait, the
            others keep their progress; elsewhere the caller sees to that.
    """
    views: list[Any] = [backend.host.numpy_view(figure) for figure in (norm, *old)]
    if any(view is None for view in views):
        return judged(backend.xp, rules, norm, old)
    now, known = views[0], Progress(*views[1:])
    running = None if active is None else backend.host.numpy_view(active)
    with np.errstate(all="ignore"):
        if not np.count_nonzero(known.level) and (fast(rules, now, known) & (known.norm > 0.0)).all():
            best, steps = np.minimum(now, known.best), known.since + np.int32(1)
            after, refused = Progress(known.level, now, best, known.norm, steps, known.rate), None
        else:
            after, refused = judged(np, rules, now, known)
    if running is not None:
        after = Progress(*(a if a is b else np.where(running, a, b) for a, b in zip(after, known, strict=True)))
        refused = None if refused is None else refused & running
    progress = Progress(*map(backend.host.from_numpy_view, after))
    if refused is None or not np.count_nonzero(refused):
        return progress, None
    return progress, backend.host.from_numpy_view(refused)


def judged(xp: Any, rules: Rules, norm: Any, old: Progress) -> tuple[Progress, Any]:
    """Return the progress of each sample after a step to a residual of `norm`, and which samples refuse the step."""
    refused = (norm > rules.max_residual_growth * old.best) & (old.level != NEWTON)  # the loop sees to NaN
    after = xp.where(refused, old.norm, norm)
    plain, accelerated = old.level == PLAIN, old.level == ACCELERATED
    begins = plain & ~(old.norm > 0.0)  # put somewhere by `restarted`: this step has only measured it
    gained = ~plain & (after < HALVED * old.mark)
    tried = accelerated & (old.rate < NEVER)
    steps = old.since + xp.where(refused, (rules.patience + 1) // 2, 1)
    slow = plain & ~begins & ~fast(rules, norm, old)
    stuck = accelerated & ~gained & (steps >= rules.patience)
    over = tried & gained & (steps >= rules.trial)
    back = over & (after > old.mark * old.rate ** xp.astype(FASTER * steps, old.rate.dtype))
    marked = gained & (~tried | over)
    top = NEWTON if rules.escalates else ACCELERATED
    level = xp.where(slow, ACCELERATED, xp.where(stuck, top, xp.where(back, PLAIN, old.level)))
    begun = slow | stuck
    return Progress(
        level=xp.astype(level, xp.int32),
        norm=after,
        best=xp.where(after < old.best, after, old.best),
        mark=xp.where(plain & ~slow & ~begins, old.norm, xp.where(marked | begun | begins, after, old.mark)),
        since=xp.astype(xp.where(begun | marked | begins, 0, steps), xp.int32),
        rate=xp.where(slow, contraction(xp, after, old), xp.where(over & ~back, NEVER, old.rate)),
    ), refused


def fast(rules: Rules, norm: Any, old: Progress) -> Any:
    """Return which plain samples stay plain after a step to a residual of `norm`; NaN is not fast.

    A step may leave more than `slow` of the residual if the two last steps together leave at most `slow` of it each,
    the first one up to `GROWN` times the residual. A sample that is back from acceleration stays plain while its steps
    gain half of what they gained before.
    """
    first = (old.since < 1) & (norm <= GROWN * old.norm)
    later = (norm <= rules.slow * old.norm) | (norm <= rules.slow**2 * old.mark)
    fresh = (first | later) & (old.since < rules.plain_steps - 1)
    return fresh & (old.rate <= 0.0) | (old.rate > 0.0) & (norm <= 0.5 * (1.0 + old.rate) * old.norm)


def contraction(xp: Any, norm: Any, old: Progress) -> Any:
    """Return what a plain step has left of the residual on the average of the last two; NEVER the second time."""
    before = xp.where(old.norm > 0.0, old.norm, xp.ones_like(old.norm))
    earlier = xp.where(old.mark > 0.0, old.mark, xp.ones_like(old.mark))
    rate = xp.where(old.since < 1, norm / before, xp.sqrt(norm / earlier))
    usable = (old.rate <= 0.0) & (rate > 0.0) & (rate < NEVER)
    return xp.where(usable, rate, xp.full_like(rate, NEVER))
