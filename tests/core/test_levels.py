"""The levels of the solver `auto`, against the rules of its docstring for one sample in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

import deqcore
from deqcore.solvers.levels import ACCELERATED, NEWTON, PLAIN, Progress, Rules, judged, progressed


def by_hand(rules, norm, level, known, best, mark, since, rate):
    """One sample: its progress after a step to a residual of `norm`, and whether it refuses the step."""
    refused = level != NEWTON and norm > rules.max_residual_growth * best
    now = known if refused else norm
    best = best if math.isnan(now) else min(best, now)
    steps = since + (math.ceil(rules.patience / 2) if refused else 1)
    if level == PLAIN:
        if not known > 0:  # its first residual
            return (PLAIN, now, best, now, 0, rate), refused
        if stays_plain(rules, norm, known, mark, since, rate):
            return (PLAIN, now, best, known, steps, rate), refused
        left = now / known if since < 1 else math.sqrt(now / (mark or 1.0))
        return (ACCELERATED, now, best, now, 0, left if rate == 0 and 0 < left < 1 else 1.0), refused
    if now < mark / 2:  # progress
        if level == ACCELERATED and rate < 1:  # on trial
            if steps < rules.trial:
                return (level, now, best, mark, steps, rate), refused
            poor = now > mark * rate ** (1.4 * steps)
            return (PLAIN if poor else level, now, best, now, 0, rate if poor else 1.0), refused
        return (level, now, best, now, 0, rate), refused
    if level == ACCELERATED and steps >= rules.patience:
        return (NEWTON if rules.escalates else ACCELERATED, now, best, now, 0, rate), refused
    return (level, now, best, mark, steps, rate), refused


def stays_plain(rules, norm, known, mark, since, rate):
    if rate > 0:  # it is back from acceleration
        return norm <= (1 + rate) / 2 * known
    if since >= rules.plain_steps - 1:
        return False
    return norm <= rules.slow * known or norm <= rules.slow**2 * mark or (since < 1 and norm <= 2 * known)


@pytest.mark.parametrize(
    "rules",
    [
        Rules(0.7, 16, 10, 10.0, True, 4),
        Rules(0.9, 3, 3, 2.0, True, 1),
        Rules(1.0, 5, 1, 1.5, False, 16),
        Rules(0.5, 1, 4, 4.0, True, 3),
    ],
)
def test_a_step_is_judged_as_the_rules_say(rules):
    rng = np.random.default_rng(0)
    batch = 300
    start = rng.uniform(0.5, 2.0, batch)
    start[:5] = 0.0
    none = np.zeros(batch, np.int32)
    progress = Progress(none, start, start, start, none, np.zeros(batch))
    reached, returned = {PLAIN}, 0
    for _ in range(40):
        factor = rng.choice([0.0, 0.3, 0.5, 0.69, 0.7, 0.95, 1.0, 1.2, 1.6, 3.0, 12.0], batch)
        with np.errstate(invalid="ignore"):
            norm = np.where(rng.random(batch) < 0.02, [np.nan, np.inf][rng.integers(2)], factor * progress.norm)
        samples = list(zip(*(field.tolist() for field in progress), strict=True))
        expected = [by_hand(rules, *each) for each in zip(norm.tolist(), *zip(*samples, strict=True), strict=True)]
        before = progress.level
        with np.errstate(all="ignore"):
            progress, refused = judged(np, rules, norm, progress)
        returned += int(np.sum((before == ACCELERATED) & (progress.level == PLAIN)))
        for found, column in zip(progress, zip(*(each for each, _ in expected), strict=True), strict=True):
            np.testing.assert_array_equal(found, column)
        assert refused.tolist() == [bool(each) for _, each in expected]
        assert progress.level.dtype == progress.since.dtype == np.int32
        reached |= set(progress.level.tolist())
    assert returned > 0
    assert reached == ({PLAIN, ACCELERATED, NEWTON} if rules.escalates else {PLAIN, ACCELERATED})


@pytest.mark.parametrize("level", [PLAIN, ACCELERATED])
def test_a_sample_that_has_stopped_keeps_its_progress(level):
    """Its residual is measured with those of the others, and decides nothing."""
    backend, rules = deqcore.get_backend(backend="numpy"), Rules(0.7, 16, 10, 2.0, True, 4)
    one, active = np.ones(6), np.array([True, False] * 3)
    old = Progress(np.full(6, level, np.int32), one, one, one, np.zeros(6, np.int32), 0 * one)
    norm = np.array([0.5, 0.5, 0.9, 0.9, 50.0, 50.0])
    whole, all_refused = progressed(backend, rules, norm, old, None)
    found, refused = progressed(backend, rules, norm, old, active)
    for name, each, before, after in zip(old._fields, found, old, whole, strict=True):
        np.testing.assert_array_equal(each, np.where(active, after, before), err_msg=name)
    assert all_refused.tolist() == [False] * 4 + [True] * 2
    assert refused.tolist() == [False] * 4 + [True, False]
    assert progressed(backend, rules, norm, old, norm < 1)[1] is None
