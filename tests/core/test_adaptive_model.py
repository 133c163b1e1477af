"""Passes of the adaptive strategy against dense linear algebra: its u, its report and its next state."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

import deqcore
from deqcore.backward.adaptive import Adaptive
from deqcore.backward.controller import Signals
from deqcore.types import PassInputs, Status


def dense(a, g, z, sound, m):
    """Return u, the powers, and the inner products of the gradients Σ u zᵀ of the sound samples, those of u first."""
    u = np.linalg.solve(np.eye(g.shape[1]) - a.swapaxes(1, 2), g[..., None])[..., 0]
    powers = [g]
    for _ in range(m - 1):
        powers.append(np.einsum("bij,bi->bj", a, powers[-1]))
    p = np.stack([(v[sound].T @ z[sound]).ravel() for v in (u, *powers)])
    return u, powers, p @ p.T


@pytest.mark.parametrize(("batch", "n"), [(6, 5), (6, 6), (2, 2)], ids=str)  # a parameter may look like a batch
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"max_relative_error": 0.5, "audit_every": 6, "max_vjps": 2},
        {"max_relative_error": 0.2, "audit_every": 4, "max_vjps": 2, "fallback": "none"},
        {"max_relative_error": 0.9, "audit_every": 5, "max_vjps": 1, "audit_rtol": 1e-10},
    ],
)
def test_a_pass_is_what_dense_algebra_makes_of_its_state(options, traced, batch, n):
    """Each pass begins with the state that the strategy returned; the same where decisions are made of arrays."""
    backend, rng = deqcore.get_backend(backend="numpy"), np.random.default_rng(0)
    strategy = Adaptive(**options)
    rules, m = strategy.controller, strategy.max_vjps + 1
    values, kinds = np.asarray(strategy.init_state(), np.float32), set()
    common = rng.standard_normal((n, n))
    common /= np.abs(np.linalg.eigvals(common)).max()
    for number in range(28):
        a = (0.3 if number < 12 else 0.9) * common * rng.uniform(0.9, 1.0, (batch, 1, n))
        g, z = rng.standard_normal((2, batch, n)) + 0.5
        converged = rng.random(batch) < (0.0 if 16 <= number < 20 else 0.95)
        left = np.where(rng.random(batch) < 0.1, np.nan, rng.uniform(1e-4, 1e-2, batch))
        inputs = PassInputs(values, converged, left, lambda u, z=z: (u.T @ z,))
        with mock.patch.object(type(backend), "is_traced", return_value=traced), np.errstate(all="ignore"):
            vjp = lambda v, a=a: np.einsum("bij,bi->bj", a, v)
            u, report, after = strategy.solve_with_state(backend, vjp, g, None, inputs)
        before, found = rules.unpack(np, values.astype(np.float64)), rules.unpack(np, np.asarray(after, np.float64))
        now = Signals(np.nanmean(left), 1 - converged.mean())
        exact, powers, gram = dense(a, g, z, converged, m)
        audit = bool(rules.due(np, before))
        solves = audit or before.chosen >= m
        if solves:
            np.testing.assert_allclose(u, exact, rtol=1e-6, atol=1e-6)
            assert (report.status == int(Status.CONVERGED)).all()
            assert ((report.vjps >= m - 1) | ~np.array(audit)).all()
            assert (report.vjps <= 2 * n + 1).all()
            true = np.linalg.norm(g + np.einsum("bij,bi->bj", a, u) - u, axis=1) / np.linalg.norm(g, axis=1)
            np.testing.assert_allclose(report.residual, true, atol=1e-7)
            assert (true <= 1e-7).all()
        else:
            k = int(rules.steps(np, before))
            c = before.coefficients
            np.testing.assert_allclose(u, sum(c[j] * powers[j] for j in range(min(k, m - 1) + 1)), rtol=1e-5, atol=1e-6)
            missed = before.bound > strategy.max_relative_error
            assert (report.status == int(Status.MAX_STEPS if missed else Status.CONVERGED)).all()
            assert (report.vjps == k).all()
            assert np.isnan(report.residual).all()
        counted = audit and converged.any()
        if counted:
            unit = gram / gram[0, 0]
            expected = rules.learn(np, before, unit[1:, 1:], unit[0, 1:], np.eye(m), now)
        elif audit:
            expected = rules.exclude(np, before)
        elif solves:
            expected = before._replace(since=before.since + 1)
        else:
            w = powers[k] if k < m else None
            growth = np.mean(np.linalg.norm(w, axis=1) / np.linalg.norm(g, axis=1))
            expected = rules.grown(np, before, growth, now)
        products = m + 2 if audit else 0
        assert (report.gradient_products == products).all()
        expected = expected._replace(
            passes=before.passes + 1, vjps=before.vjps + report.vjps.max(), products=before.products + products
        )
        found, expected = (each._replace(level=np.exp(each.level)) for each in (found, expected))
        pairs = zip(found._fields, found, expected, strict=True)
        off = [each for each in pairs if not np.allclose(*each[1:], rtol=2e-3, atol=2e-3)]
        assert not off, f"pass {number}: {off}"
        judged = counted and found.error >= 0
        for reported, known in ((report.gradient_error, found.error), (report.gradient_cosine, found.cosine)):
            np.testing.assert_allclose(reported, known if judged else np.nan, rtol=1e-5)
        kinds.add((bool(audit), bool(solves), bool(counted)))
        values = np.asarray(after, np.float32)
    assert {(True, True, True), (True, True, False), (False, False, False)} <= kinds


@pytest.mark.parametrize("slowest", [0.9, 0.9999])
def test_an_audit_that_one_krylov_space_does_not_solve(slowest):
    """60 numbers, condition up to 7000: what is reported is what took place, and u is that of a dense solve."""
    backend, rng = deqcore.get_backend(backend="numpy"), np.random.default_rng(1)
    q = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    a, g = q @ np.diag(np.linspace(0.3, slowest, 60)) @ q.T, rng.standard_normal((1, 60))
    strategy, calls = Adaptive(max_vjps=6, audit_rtol=1e-9), []

    def vjp(v):
        calls.append(1)
        return v @ a

    values = np.asarray(strategy.init_state(), np.float32)
    inputs = PassInputs(values, np.ones(1, bool), np.zeros(1), lambda u: (u.sum(0),))
    with np.errstate(all="ignore"):
        u, report, _ = strategy.solve_with_state(backend, vjp, g, None, inputs)
    left = np.linalg.norm(g + u @ a - u) / np.linalg.norm(g)
    assert report.vjps[0] == len(calls) > 20
    assert report.status[0] == int(Status.CONVERGED)
    assert left <= 2e-9
    np.testing.assert_allclose(u[0], np.linalg.solve(np.eye(60) - a.T, g[0]), rtol=1e-3, atol=1e-3)


def test_an_audit_reaches_all_powers_however_loose_its_tolerance():
    """The coefficients of k vjps need k dimensions, also where fewer meet the tolerance of the solve."""
    backend, g = deqcore.get_backend(backend="numpy"), np.random.default_rng(2).standard_normal((3, 20))
    a = 0.05 * np.random.default_rng(3).standard_normal((20, 20))
    strategy = Adaptive(max_vjps=6, audit_rtol=0.5)
    values = np.asarray(strategy.init_state(), np.float32)
    inputs = PassInputs(values, np.ones(3, bool), np.zeros(3), lambda u: (u.sum(0),))
    _, report, _ = strategy.solve_with_state(backend, lambda v: v @ a, g, None, inputs)
    assert (report.vjps == 6).all()
