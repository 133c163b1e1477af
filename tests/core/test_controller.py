"""The controller of the adaptive strategy, against its rules (docs/notes/adaptive.md) with plain numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deqcore.backward.controller import Controller, Signals, judged, nested

RIDGE, LOWEST = 1e-4, 1e-4


def fits(gram, right):
    """Least squares by the first 1, 2, … vectors, with a ridge on the Gram matrix of unit vectors."""
    m, size = len(right), np.sqrt(np.maximum(np.diag(gram), 1e-30))
    found = np.zeros((m, m))
    for k in range(1, m + 1):
        a = gram[:k, :k] / np.outer(size[:k], size[:k]) + RIDGE * np.eye(k)
        found[k - 1, :k] = np.linalg.solve(a, right[:k] / size[:k]) / size[:k]
    return found


class Model:
    """What the strategy's note says, one number at a time."""

    def __init__(self, target, audit_every, m, exact):
        self.target, self.audit_every, self.m, self.exact = target, audit_every, m, exact
        self.begun = self.jumped = False
        self.since = self.interval = self.audits = self.excluded = self.chosen = self.over = 0
        self.bound = self.error = self.cosine = self.growth = self.forward = self.unconverged = 0.0
        self.gram, self.right, self.coefficients = np.zeros((m, m)), np.zeros(m), np.zeros(m)
        self.level, self.deviation = np.zeros(m), np.zeros(m)

    def due(self):
        interval = min(16, self.interval) if self.chosen == self.m else self.interval
        return not self.begun or self.jumped or self.since + 1 >= interval

    def steps(self):
        return 1 if self.chosen == 0 and self.since % 8 == 0 else self.chosen

    def grown(self, growth, forward, unconverged):
        if self.steps() > 0:
            known = self.growth > 0
            self.jumped |= known and not self.growth / 1.5 <= growth <= 1.5 * self.growth
            average = 0.9 * self.growth + 0.1 * growth if known else growth
        else:
            average = self.growth
        self.jumped |= forward > 6.0 * self.forward and unconverged > 0
        self.jumped |= unconverged > self.unconverged + 0.1
        self.growth = average
        self.since += 1

    def powers(self):
        return min(self.chosen + 2, self.m) if self.exact and self.chosen < self.m else self.m

    def learn(self, gram, right, forward, unconverged):
        first, formed = not self.begun, self.powers()
        gram, right = cut(gram, right, formed)
        weight = 1.0 if first else max(1.0 / (self.audits + 1), 0.3)
        fresh = [j < formed and (first or self.deviation[j] < 0) for j in range(self.m)]
        earlier, own = fits(self.gram, self.right), fits(gram, right)
        errors, cosines, deviation = np.zeros(self.m), np.zeros(self.m), -np.ones(self.m)
        for k in range(formed):
            c = own[k] if fresh[k] else earlier[k]
            square = c @ gram @ c
            errors[k] = math.sqrt(max(1 - 2 * c @ right + square, LOWEST**2))
            cosines[k] = c @ right / math.sqrt(square) if square > 0 else 0.0
            if fresh[k]:
                self.level[k] = math.log(1.2 * errors[k])
            else:
                excess = min(max(2 * (math.log(errors[k]) - self.level[k]), 0), 2)
                deviation[k] = (1 - weight) * self.deviation[k] + weight * excess
                self.level[k] = (1 - weight) * self.level[k] + weight * math.log(errors[k])
        known = max(0.3, *deviation)
        self.deviation = np.where(fresh, known, deviation)
        share = 1.0 if any(fresh) else weight
        self.gram = (1 - share) * self.gram + share * gram
        self.right = (1 - share) * self.right + share * right
        in_force = self.chosen < self.m
        error = errors[self.chosen] if in_force else 0.0
        judged = in_force and not first
        self.error = error if judged else -1.0
        self.cosine = cosines[self.chosen] if judged else -1.0
        over = not first and error > self.target
        surprised = over and error > self.bound
        self.over += over
        self.audits += 1
        self.begun, self.jumped, self.growth, self.since = True, False, 0.0, 0
        self.forward, self.unconverged = forward, unconverged
        self.choose(first, surprised, formed)

    def choose(self, first, surprised, formed):
        bounds = np.where(self.deviation < 0, math.inf, np.exp(self.level + 4.0 * self.deviation))
        least = next((k for k in range(self.m) if bounds[k] <= self.target), self.m)
        easy = next((k for k in range(self.m) if bounds[k] <= 0.8 * self.target), self.m)
        old = self.chosen
        self.chosen = least if first or least >= old else min(easy, old)
        if not self.exact:
            self.chosen = min(self.chosen, self.m - 1)
        exact = self.chosen == self.m
        self.jumped = exact and formed < self.m
        self.bound = 0.0 if exact else bounds[self.chosen]
        self.coefficients = np.zeros(self.m) if exact else fits(self.gram, self.right)[self.chosen]
        nearer = surprised or (not first and self.chosen > old)
        interval = self.interval / 4 if nearer else 2 * self.interval
        self.interval = min(max(math.floor(interval), 1), self.audit_every)

    def exclude(self):
        again = min(max(math.floor(self.interval / 2), 1), self.audit_every)
        self.since = self.interval - again if self.begun else 0
        self.excluded += 1
        self.jumped = False


def cut(gram, right, formed):
    """Inner products of the first powers; those of the others are zero."""
    kept = np.arange(len(right)) < formed
    return gram * np.outer(kept, kept), right * kept


def audit(rng, m, hard):
    """Inner products of p_j and their target, in units of the target's square; `hard` makes a fit worse."""
    p = rng.standard_normal((m, 30)) + rng.standard_normal(30)
    weights = hard ** np.arange(m) * rng.uniform(0.7, 1.3, m)
    truth = weights @ p + hard**m * 4.0 * rng.standard_normal(30)
    unit = truth @ truth
    return p @ p.T / unit, p @ truth / unit


@pytest.mark.parametrize(
    ("target", "audit_every", "m", "exact"),
    [(0.5, 50, 5, True), (0.5, 6, 3, True), (0.7, 20, 4, False), (0.8, 1, 1, True)],
)
def test_every_pass_is_decided_as_the_rules_say(target, audit_every, m, exact):
    rng = np.random.default_rng(1)
    rules, model = Controller(target, audit_every, m, exact), Model(target, audit_every, m, exact)
    state, eye = rules.unpack(np, np.array(rules.initial())), np.eye(m)
    fields = [name for name in state._fields if name not in ("passes", "vjps", "products", "square")]
    chosen, jumps = [], 0
    for number in range(160):
        assert bool(rules.due(np, state)) == bool(model.due()), f"pass {number}: an audit is due"
        assert float(rules.steps(np, state)) == model.steps()
        lost = float(rng.choice([0.0, 0.0, 0.0, 0.05, 0.2]))
        residual = float(rng.choice([1e-3, 2e-3, 1e-2]))
        now = Signals(np.float64(residual), np.float64(lost))
        if model.due() and rng.random() < 0.1:
            state = rules.exclude(np, state)
            model.exclude()
        elif model.due():
            hard = 0.45 + 0.4 * math.sin(number / 12)
            gram, right = cut(*audit(rng, m, hard), model.powers())
            assert float(rules.powers(np, state)) == model.powers()
            state = rules.learn(np, state, gram, right, eye, now)
            model.learn(gram, right, residual, lost)
            chosen.append(model.chosen)
            assert model.chosen == m or model.deviation[model.chosen] >= 0, "chosen, and not measured"
        else:
            factor = rng.choice([0.6, 0.9, 1.0, 1.1, 1.6], p=[0.05, 0.3, 0.3, 0.3, 0.05])
            growth = (model.growth or 0.5) * float(factor)
            state = rules.grown(np, state, np.float64(growth), now)
            model.grown(growth, residual, lost)
            jumps += model.jumped
        off = [n for n in fields if not np.allclose(getattr(state, n), getattr(model, n), rtol=1e-6, atol=1e-9)]
        assert not off, f"pass {number}: {[(n, getattr(state, n), getattr(model, n)) for n in off]}"
    assert model.excluded > 0
    assert jumps > 3 or audit_every == 1
    assert len(set(chosen)) >= min(3, m), f"{chosen}: too few decisions to test them"


def test_a_state_that_is_packed_comes_back_and_one_with_nan_is_new():
    rules = Controller(0.5, 10, 3, True)
    values = np.arange(len(rules.initial()), dtype=float)
    assert np.array_equal(rules.pack(np, rules.unpack(np, values)), values)
    values[7] = np.nan
    assert np.array_equal(rules.pack(np, rules.unpack(np, values)), rules.initial())


def state_of(rules, seed):
    """A state after one audit, with other choices for other seeds."""
    state, eye = rules.unpack(np, np.array(rules.initial())), np.eye(rules.candidates)
    audited = audit(np.random.default_rng(seed), rules.candidates, 0.2 + 0.1 * seed)
    audited = cut(*audited, int(rules.powers(np, state)))
    learned = rules.learn(np, state, *audited, eye, Signals(np.float64(1e-3), np.float64(0.0)))
    return rules.pack(np, learned._replace(interval=np.float64(8.0)))


@pytest.mark.parametrize("lanes", [2, 3])
def test_states_that_were_added_or_averaged_change_no_gradient(lanes):
    rules = Controller(0.5, 10, 4, True)
    one, other = state_of(rules, 1), state_of(rules, 4)
    chosen = [float(rules.unpack(np, values).chosen) for values in (one, other)]
    assert chosen[0] != chosen[1]
    for same in (lanes * one, one):
        found = rules.unpack(np, same)
        assert rules.pack(np, found) == pytest.approx(one, rel=1e-12)
        assert not rules.due(np, found)
    for mixed in (one + other, (one + (lanes - 1) * other) / lanes):
        found = rules.unpack(np, mixed)
        assert rules.due(np, found)
        assert found.chosen == rules.candidates  # exact


def test_the_sweep_is_least_squares_and_its_errors_are_measured():
    rng = np.random.default_rng(2)
    for m in (1, 2, 6):
        gram, right = audit(rng, m, 0.8)
        found = nested(np, gram, right, np.eye(m))
        np.testing.assert_allclose(found, fits(gram, right), rtol=1e-7, atol=1e-10)
        error, cosine = judged(np, np.concatenate([found, 0 * found[:1]]), gram, right)
        for c, e, cos in zip(found, error, cosine, strict=False):
            assert e == pytest.approx(math.sqrt(1 - 2 * c @ right + c @ gram @ c))
            assert cos == pytest.approx(c @ right / math.sqrt(c @ gram @ c))
        assert (error[-1], cosine[-1]) == (1.0, 0.0)


def test_a_state_whose_audits_measured_all_serves_those_that_measure_few():
    """As in an older checkpoint: the others are marked, and a rise beyond them asks for an audit of all."""
    rules, rng, eye = Controller(0.5, 10, 5, True), np.random.default_rng(3), np.eye(5)
    gram, right = audit(rng, 5, 0.3)
    begin = rules.unpack(np, np.array(rules.initial()))
    old = begin._replace(
        begun=np.float64(1), audits=np.float64(4), interval=np.float64(8), chosen=np.float64(1), gram=gram, right=right,
        square=np.float64(1), level=np.full(5, math.log(0.2)), deviation=np.full(5, 0.2),
    )  # fmt: skip
    now = Signals(np.float64(1e-3), np.float64(0.0))
    assert not rules.due(np, old)
    same = rules.learn(np, old, *cut(gram, right, 3), eye, now)
    assert same.chosen <= 1
    assert (same.deviation[:3] >= 0).all()
    assert (same.deviation[3:] == -1).all()
    hard = rules.learn(np, old, *cut(*audit(rng, 5, 3.0), 3), eye, now)
    assert hard.chosen == 5
    assert rules.due(np, hard)
    assert rules.powers(np, hard) == 5
