"""Passes of the adaptive strategy against dense linear algebra: its u, its report and its next state."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

import deqcore
from deqcore.backward.adaptive import Adaptive
from deqcore.backward.controller import Signals
from deqcore.types import PassInputs, Status

BATCH, N = 6, 5


def dense(a, g, z, sound, m):
    """Return u, the powers, and the inner products of the gradients Σ u zᵀ of the sound samples, those of u first."""
    u = np.linalg.solve(np.eye(N) - a.swapaxes(1, 2), g[..., None])[..., 0]
    powers = [g]
    for _ in range(m - 1):
        powers.append(np.einsum("bij,bi->bj", a, powers[-1]))
    p = np.stack([(v[sound].T @ z[sound]).ravel() for v in (u, *powers)])
    return u, powers, p @ p.T


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"max_relative_error": 0.5, "audit_every": 6, "max_vjps": 2},
        {"max_relative_error": 0.2, "audit_every": 4, "max_vjps": 2, "fallback": "none"},
        {"max_relative_error": 0.9, "audit_every": 5, "max_vjps": 1, "audit_rtol": 1e-10},
    ],
)
def test_a_pass_is_what_dense_algebra_makes_of_its_state(options, traced):
    """Each pass begins with the state that the strategy returned; the same where decisions are made of arrays."""
    backend, rng = deqcore.get_backend(backend="numpy"), np.random.default_rng(0)
    strategy = Adaptive(**options)
    rules, m = strategy.controller, strategy.max_vjps + 1
    values, kinds = np.asarray(strategy.init_state(), np.float32), set()
    common = rng.standard_normal((N, N))
    common /= np.abs(np.linalg.eigvals(common)).max()
    for number in range(28):
        a = (0.3 if number < 12 else 0.9) * common * rng.uniform(0.9, 1.0, (BATCH, 1, N))
        g, z = rng.standard_normal((2, BATCH, N)) + 0.5
        converged = rng.random(BATCH) < (0.0 if 16 <= number < 20 else 0.95)
        left = np.where(rng.random(BATCH) < 0.1, np.nan, rng.uniform(1e-4, 1e-2, BATCH))
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
            assert (report.vjps <= 2 * N + 1).all()
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
