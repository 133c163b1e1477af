"""The default solver: when it accelerates, escalates, stores, and that a sample's result is its own."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.solve.loop import iterate
from deqcore.solvers.auto import Auto
from deqcore.solvers.levels import ACCELERATED, NEWTON, PLAIN
from deqcore.solvers.picard import Picard
from deqcore.testing.strict.backend import StrictBackend
from deqcore.types import StoppingCriteria

QUIET = {"forward__on_failure": "ignore"}


def levels(sol):
    return sol.backend.to_numpy(sol.state.carry.state.progress.level).tolist()


def values(sol, of="value"):
    return sol.backend.to_numpy(getattr(sol, of))


def rated(be, rates, n=8, seed=0):
    """f(z) = rate · Q z + b with an orthogonal Q per sample, and its solution."""
    rng = np.random.default_rng(seed)
    q = np.stack([np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in rates])
    a, b = np.asarray(rates)[:, None, None] * q, rng.standard_normal((len(rates), n))
    truth = np.linalg.solve(np.eye(n) - a, b[:, :, None])[:, :, 0]
    a, b = be.asarray(a), be.asarray(b)
    return lambda z: be.xp.sum(a * z[:, None, :], axis=2) + b, 0 * b, truth


def test_it_is_the_default():
    assert deqcore.Config().forward.solver == "auto"


def test_contracting_samples_take_the_steps_of_picard(be):
    f, z0, _ = rated(be, [0.1, 0.3, 0.5])
    settings = {"forward__rtol": 1e-4}
    sol, plain = (deqcore.fixed_point(f, z0, forward__solver=name, **settings) for name in ("auto", "picard"))
    assert levels(sol) == [PLAIN] * 3
    assert np.array_equal(values(sol), values(plain))
    assert np.array_equal(values(sol, "steps"), values(plain, "steps"))
    assert not np.any(be.to_numpy(Auto().inverse_jacobian(be, sol.state.carry.state).known()))


def test_a_torch_history_has_no_storage_until_a_sample_accelerates():
    torch = pytest.importorskip("torch")
    x = torch.randn(6, 5000)
    for rate, chunks in ((0.3, 0), (0.95, 2)):
        sol = deqcore.fixed_point(lambda z, rate=rate: rate * torch.sin(z) + x, 0 * x, forward__rtol=1e-6)
        memory = sol.state.carry.state.memory
        assert len(memory.values.store.chunks) == len(memory.residuals.store.chunks) == chunks
        assert memory.residual.numel() == 0


def test_one_stiff_sample_of_64_accelerates_alone(be):
    rates = np.full(64, 0.2)
    rates[17] = 0.98
    f, z0, truth = rated(be, rates)
    sol = deqcore.fixed_point(f, z0, forward__rtol=1e-9, forward__max_steps=80)
    assert sol.converged.all()
    assert [i for i, level in enumerate(levels(sol)) if level != PLAIN] == [17]
    assert np.abs(values(sol) - truth).max() < 1e-6
    known = be.to_numpy(Auto().inverse_jacobian(be, sol.state.carry.state).known())
    assert known.tolist() == [i == 17 for i in range(64)]


def test_a_sample_that_gains_nothing_by_acceleration_returns_to_plain_steps(be):
    """Eigenvalues of one size all around a circle: no polynomial of the differences is better than the last iterate."""
    f, z0, truth = rated(be, [0.2, 0.88], n=96)
    settings = {"forward__rtol": 1e-7, "forward__max_steps": 200}
    sol, plain = (deqcore.fixed_point(f, z0, forward__solver=name, **settings) for name in ("auto", "picard"))
    assert sol.converged.all()
    assert levels(sol) == [PLAIN] * 2
    rate = be.to_numpy(sol.state.carry.state.progress.rate)
    assert rate[0] == 0.0
    assert rate[1] == pytest.approx(0.88, rel=1e-3)  # measured before it accelerated
    assert int(sol.steps[1]) <= int(plain.steps[1])
    assert np.abs(values(sol) - truth).max() < 1e-4


def test_one_slow_step_is_no_reason_to_accelerate(be):
    """The iterates are 9, .9, .45 and .045: the residuals fall by .056, by .9 only, and by .1."""
    f = lambda z: be.xp.where((z > 0.6) & (z < 1.0), 0.5 * z, 0.1 * z)
    sol = deqcore.fixed_point(f, be.asarray(np.full((1, 1), 9.0)), forward__rtol=0.0, forward__atol=1e-6)
    assert sol.converged.all()
    assert levels(sol) == [PLAIN]


def test_a_sample_has_the_same_bits_in_any_batch(be):
    """f by element, so that its own bits do not depend on the batch; batch mates accelerate at other steps, or not."""
    rng = np.random.default_rng(4)
    a, b = rng.uniform(-3.0, 0.99, (8, 33)), rng.standard_normal((8, 33))
    a[0] *= 0.1
    a[3] = 0.3 * np.abs(a[3])

    def solved(rows):
        w, x = be.asarray(a[rows]), be.asarray(b[rows])
        f = lambda z: be.xp.tanh(0.9 * w * be.xp.roll(z, 1, axis=1) + x) + 0.3 * w * z
        sol = deqcore.fixed_point(f, 0 * x, forward__max_steps=80, **QUIET)
        return values(sol), levels(sol), values(sol, "evaluations")

    whole = solved(list(range(8)))
    assert len(set(whole[1])) > 1
    for rows in ([i] for i in range(8)):
        alone = solved(rows)
        assert np.array_equal(alone[0][0], whole[0][rows[0]])
        assert alone[2][0] == whole[2][rows[0]]
    some = solved([5, 3, 0])
    assert np.array_equal(some[0], whole[0][[5, 3, 0]])


def test_a_contraction_that_changes_midway(be):
    """Fast far from the solution, at a rate of 0.97 near it: plain steps first, then accelerated ones."""
    xp = be.xp
    f = lambda z: xp.where(xp.abs(z - 1.0) > 0.1, 1.0 + 0.3 * (z - 1.0), 1.0 - 0.97 * (z - 1.0))
    sol = deqcore.fixed_point(f, be.asarray(np.full((1, 3), 60.0)), forward__rtol=1e-10)
    assert sol.converged.all()
    assert levels(sol) == [ACCELERATED]
    assert np.abs(values(sol) - 1.0).max() < 1e-8
    assert int(sol.steps[0]) < 16  # at 0.97 alone it would be hundreds


@pytest.mark.parametrize("start", [0.0, 0.9])
def test_cycles_are_broken(be, start):
    """z ← 1 − z moves between two points; z ← 3.2 z (1 − z) has an attracting cycle beside its fixed point."""
    z0 = be.asarray(np.full((2, 1), start if start else 0.2))
    assert np.abs(values(deqcore.fixed_point(lambda z: 1.0 - z, z0)) - 0.5).max() < 1e-8
    sol = deqcore.fixed_point(lambda z: 3.2 * z * (1.0 - z), z0)
    assert sol.converged.all()
    assert np.abs(values(sol) * (values(sol) - 0.6875)).max() < 1e-7


def test_a_plateau_escalates_to_newton(be):
    """z − z³/8 contracts ever more slowly towards its triple root at 0; arctan cells need the Jacobian."""
    sol = deqcore.fixed_point(
        lambda z: z - z**3 / 8.0, be.asarray(np.ones((1, 1))), forward__max_steps=200, forward__rtol=0.0,
        forward__atol=1e-12,
    )  # fmt: skip
    assert sol.converged.all()
    assert np.abs(values(sol)).max() < 1e-3
    rng = np.random.default_rng(2)
    q = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    w = be.asarray((q * np.linspace(-1.0, 0.999, 60)) @ q.T)
    x = be.asarray(rng.standard_normal((1, 60)))
    sol = deqcore.fixed_point(lambda z: z @ w + x, 0 * x, forward__rtol=1e-10, forward__options={"patience": 4})
    assert sol.converged.all()
    assert levels(sol) == [NEWTON]
    assert int(sol.evaluations[0]) > int(sol.steps[0]) + 1  # products are counted
    inverse = np.linalg.inv(np.eye(60) - be.to_numpy(w))
    assert np.abs(values(sol) - be.to_numpy(x) @ inverse).max() < 1e-5


def test_without_escalation_no_product_is_taken(be):
    rng = np.random.default_rng(2)
    w = be.asarray(np.diag(np.linspace(-1.0, 0.999, 60)))
    x = be.asarray(rng.standard_normal((1, 60)))
    settings = {"forward__options": {"patience": 4, "escalate": False}, "forward__rtol": 1e-10, **QUIET}
    sol = deqcore.fixed_point(lambda z: z @ w + x, 0 * x, **settings)
    assert levels(sol) == [ACCELERATED]
    assert int(sol.evaluations[0]) == int(sol.steps[0]) + 1


def test_a_zero_residual_at_the_start_and_states_of_size_one(be):
    z0 = be.asarray(np.array([[0.0], [5.0]]))
    sol = deqcore.fixed_point(lambda z: 0.9 * z, z0, forward__rtol=0.0, forward__atol=1e-9)
    assert sol.converged.all()
    assert values(sol, "steps").tolist()[0] == 0
    assert levels(sol) == [PLAIN, ACCELERATED]
    assert int(sol.steps[1]) <= 4  # one pair is exact in one dimension


def test_a_step_that_grows_is_refused_and_its_difference_used(be):
    """z ← 1 − 50 z: a plain step grows the residual 50 times; the first pair then solves it."""
    sol = deqcore.fixed_point(lambda z: 1.0 - 50.0 * z, be.asarray(np.ones((1, 1))), forward__rtol=1e-12)
    assert sol.converged.all()
    assert int(sol.steps[0]) <= 4
    assert abs(float(values(sol)[0, 0]) - 1.0 / 51.0) < 1e-12


def test_reuse_reports_samples_without_pairs(be):
    f, z0, _ = rated(be, [0.2, 0.95])
    plain = {"certify": False, "max_relative_error": None, "fallback": "none"}
    g = np.ones(z0.shape)
    b = 0 * z0

    def shifted(z, b):
        return f(z) + b

    settings = {"backward__strategy": "broyden-reuse", "backward__options": plain}
    _, (u,) = deqcore.vjp(shifted, z0, b, cotangent=be.asarray(g), **settings)
    assert np.array_equal(be.to_numpy(u)[0], g[0])  # no pair: u = g
    assert np.abs(be.to_numpy(u)[1] - g[1]).max() > 1e-2
    sol = deqcore.fixed_point(shifted, z0, b, **settings)
    strategy = plugins.make_strategy("broyden-reuse", plain)
    estimate = Auto().inverse_jacobian(be, sol.state.carry.state)
    _, report = strategy.solve_adjoint(be, lambda v: v, be.asarray(g), estimate)
    assert be.to_numpy(report.fallback).tolist() == [True, False]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slow": 0.0}, "slow must be above 0 and at most 1"),
        ({"plain_steps": 0}, "plain_steps must be at least 1"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"history_size": 0}, "history_size must be at least 1"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        Auto(**options)


def test_what_is_refused_does_not_depend_on_batch_mates(be):
    """The first step grows by 1.9, the second by 6: it is refused, alone and beside a sample that accelerates."""
    table = np.array([0.0, 1.0, 2.9, 14.3, 14.3])  # f moves each point to the next one

    def walk(z):
        k = be.xp.argmin(be.xp.abs(z - be.asarray(table)[None, :]), axis=1)
        return be.asarray(np.append(table[1:], 14.3))[k][:, None]

    def refuses(z0):
        f = lambda z: be.xp.concat([walk(z[:1]), 1.0 - 3.0 * z[1:]], axis=0)  # the mate accelerates at once
        sol = deqcore.fixed_point(f, be.asarray(z0), forward__max_steps=3, forward__rtol=1e-9, **QUIET)
        return values(sol)[0].tolist(), values(sol, "residual")[0]

    assert refuses([[0.0]]) == refuses([[0.0], [5.0]])


@pytest.mark.parametrize("budget", [1, 60])
def test_traced_code_takes_the_steps_of_the_host_where_plain_steps_get_worse(budget):
    """Samples that accelerate, and one that refuses its first step: the opening leaves such a step to the solver."""
    rates = np.asarray([[0.2], [0.5], [0.98], [-1.5], [-40.0]]) * np.linspace(0.9, 1.0, 3)
    solved = []
    for backend in (deqcore.get_backend(backend="numpy"), StrictBackend()):
        slopes = backend.asarray(rates)
        for rows in (slice(0, 2), slice(0, 3), slice(0, 5)):
            f = lambda z, s=slopes[rows]: s * backend.xp.tanh(z) + 1.0  # noqa: B023
            start = backend.asarray(np.ones_like(rates)[rows])
            found = iterate(backend, Auto(), f, start, StoppingCriteria(rtol=1e-8, atol=0.0, max_steps=budget))
            solved.append([backend.to_numpy(part) for part in (found.z, found.fz, found.steps)])
    for host, traced in zip(solved[:3], solved[3:], strict=True):
        assert traced[2].tolist() == host[2].tolist()
        for ours, theirs in zip(traced[:2], host[:2], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-7)


@pytest.mark.parametrize("solver", [Auto(escalate=False), Picard()], ids=["auto", "picard"])
def test_a_sample_that_waits_in_traced_code_keeps_its_budget_and_its_bits(solver):
    """Samples that accelerate, refuse steps at a wall or do neither, while the loop runs on until its next check."""
    strict = StrictBackend()
    xp, rates = strict.xp, np.asarray([[0.5], [0.9], [-1.5], [-0.9]]) * np.linspace(0.5, 1.0, 4)

    def solved(rows, every):
        slopes = strict.asarray(rates[rows])

        def f(z):
            return xp.where(z > 3.0, xp.full_like(z, float("nan")), slopes * z + 1.0)

        control = StoppingCriteria(rtol=1e-5, atol=0.0, max_steps=10, check_every=every)
        found = iterate(strict, solver, f, strict.asarray(np.ones_like(rates[rows])), control)
        return [strict.to_numpy(part) for part in (found.z, found.steps, found.status)]

    alone = [solved(slice(row, row + 1), 1) for row in range(len(rates))]
    for part, whole in enumerate(solved(slice(None), 7)):
        assert whole.tolist() == np.concatenate([sample[part] for sample in alone]).tolist()
