"""The levels of the solver `auto`: when a sample moves up, and when it refuses a step. Residuals and counts only."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from deqcore.types import Array

PLAIN: Final = 0
ACCELERATED: Final = 1
NEWTON: Final = 2
HALVED: Final = 0.5  # part of the residual at the last progress that counts as progress


class Progress(NamedTuple):
    """What the rules know of each sample, `(batch,)` each.

    Attributes:
        level: PLAIN, ACCELERATED or NEWTON, int32. It never falls.
        norm: ‖g‖ of the current iterate.
        best: least ‖g‖ so far.
        mark: ‖g‖ at the last progress.
        since: steps since then, int32, of which a refused one counts for several; for a plain sample its steps
    """

    level: Array
    norm: Array
    best: Array
    mark: Array
    since: Array


class Rules(NamedTuple):
    """The numbers of the rules: options of `Auto`, and whether a sample may reach NEWTON."""

    slow: float
    plain_steps: int
    patience: int
    max_residual_growth: float
    escalates: bool


def judged(xp: Any, rules: Rules, norm: Any, old: Progress) -> tuple[Progress, Any]:
    """Return the progress of each sample after a step to a residual of `norm`, and which samples refuse the step."""
    refused = (norm > rules.max_residual_growth * old.best) & (old.level != NEWTON)  # the loop sees to NaN
    after = xp.where(refused, old.norm, norm)
    plain = old.level == PLAIN
    gained = ~plain & (after < HALVED * old.mark)
    since = xp.where(gained, 0, old.since + xp.where(refused, (rules.patience + 1) // 2, 1))
    slow = plain & ((~(norm <= rules.slow * old.norm) & (old.norm > 0.0)) | (since >= rules.plain_steps))
    stuck = (old.level == ACCELERATED) & (since >= rules.patience)
    top = NEWTON if rules.escalates else ACCELERATED
    level = xp.where(slow, ACCELERATED, xp.where(stuck, top, old.level))
    begun = slow | stuck
    return Progress(
        level=xp.astype(level, xp.int32),
        norm=after,
        best=xp.where(after < old.best, after, old.best),
        mark=xp.where(plain | gained | begun, after, old.mark),
        since=xp.astype(xp.where(begun, 0, since), xp.int32),
    ), refused
