"""Passes of the adaptive strategy against dense linear algebra: its u, its report and its next state."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

import deqcore
from deqcore.backward.adaptive import Adaptive
from deqcore.backward.controller import Signals
from deqcore.linear import powers
from deqcore.linear.gmres import KrylovSpace
from deqcore.linear.powers import powers_gram
from deqcore.types import PassInputs, Status


def matrix(u, z):
    """Return what one weight gets: Σ u zᵀ."""
    return (u.T @ z,)


def several(u, z):
    """Return what parameters of all kinds get: a weight, a bias, a scalar, a complex one, and an earlier layer."""
    return u.T @ z, u.sum(0), np.sum(u * z), (u.T @ z)[0] + 1j * u.sum(0), 2.0 * u


GRADIENTS = {"matrix": matrix, "several": several, "none": None}


def packed(parts, batch):
    """Return one row of real numbers; an output of an earlier layer, the last of `several`, counts as its sum."""
    parts = [*parts[:4], *(part.sum(0) for part in parts[4:])] if batch else parts
    return np.concatenate([np.atleast_1d(part).ravel() for each in parts for part in (np.real(each), np.imag(each))])


def dense(a, g, z, sound, m, gradient):
    """Return u, the powers, and the inner products of the gradients of the sound samples, those of u first."""
    u = np.linalg.solve(np.eye(g.shape[1]) - a.swapaxes(1, 2), g[..., None])[..., 0]
    powers = [g]
    for _ in range(m - 1):
        powers.append(np.einsum("bij,bi->bj", a, powers[-1]))
    kept = [sound[:, None] * v for v in (u, *powers)]
    p = np.stack([v.ravel() if gradient is None else packed(gradient(v, z), len(g)) for v in kept])
    return u, powers, p @ p.T


@pytest.mark.parametrize(
    ("batch", "n", "kind"),  # a parameter may look like a batch
    [(6, 5, "matrix"), (6, 6, "matrix"), (2, 2, "matrix"), (5, 4, "several"), (4, 5, "none")],
    ids=str,
)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"max_relative_error": 0.5, "audit_every": 6, "max_vjps": 2},
        {"max_relative_error": 0.2, "audit_every": 4, "max_vjps": 2, "fallback": "none"},
        {"max_relative_error": 0.9, "audit_every": 5, "max_vjps": 1, "audit_rtol": 1e-10},
        {"max_relative_error": 0.7, "audit_every": 3, "max_vjps": 0},
        {"max_relative_error": 0.02, "audit_every": 4, "max_vjps": 1},  # exact, also between audits
    ],
)
def test_a_pass_is_what_dense_algebra_makes_of_its_state(options, traced, batch, n, kind):
    """Each pass begins with the state that the strategy returned; the same where decisions are made of arrays.

    In the last passes f expands, so that u points away from g.
    """
    gradient = GRADIENTS[kind]
    backend, rng = deqcore.get_backend(backend="numpy"), np.random.default_rng(0)
    strategy = Adaptive(**{"audit_rtol": 1e-8} | options)
    rules, m = strategy.controller, strategy.max_vjps + 1
    values, kinds = np.asarray(strategy.init_state(), np.float32), set()
    common = rng.standard_normal((n, n))
    common /= np.abs(np.linalg.eigvals(common)).max()
    for number in range(36):
        a = (0.3 if number < 12 else 0.9) * common * rng.uniform(0.9, 1.0, (batch, 1, n))
        if number >= 28:
            a = 2.5 * np.eye(n) + 0.3 * a
        g, z = rng.standard_normal((2, batch, n)) + 0.5
        converged = rng.random(batch) < (0.0 if 16 <= number < 20 else 0.95)
        left = np.where(rng.random(batch) < 0.1, np.nan, rng.uniform(1e-4, 1e-2, batch))
        inputs = PassInputs(values, converged, left, gradient and (lambda u, z=z: gradient(u, z)))
        with mock.patch.object(type(backend), "is_traced", return_value=traced), np.errstate(all="ignore"):
            vjp = lambda v, a=a: np.einsum("bij,bi->bj", a, v)
            u, report, after = strategy.solve_with_state(backend, vjp, g, None, inputs)
        before, found = rules.unpack(np, values.astype(np.float64)), rules.unpack(np, np.asarray(after, np.float64))
        known = left[np.isfinite(left)]
        now = Signals(known.mean() if known.size else 0.0, 1 - converged.mean())
        exact, series, gram = dense(a, g, z, converged, m, gradient)
        audit = bool(rules.due(np, before))
        solves, formed = audit or before.chosen >= m, int(rules.powers(np, before))
        if solves:
            np.testing.assert_allclose(u, exact, rtol=1e-6, atol=1e-6)
            assert (report.status == int(Status.CONVERGED)).all()
            assert ((report.vjps >= min(formed - 1, n)) | ~np.array(audit)).all()
            assert (report.vjps <= 2 * n + 1).all()
            true = np.linalg.norm(g + np.einsum("bij,bi->bj", a, u) - u, axis=1) / np.linalg.norm(g, axis=1)
            np.testing.assert_allclose(report.residual, true, atol=1e-7)
            assert (true <= 1e-7).all()
        else:
            k = int(rules.steps(np, before))
            c = before.coefficients
            expected = sum(c[j] * series[j] for j in range(min(k, m - 1) + 1))
            np.testing.assert_allclose(u, expected, rtol=1e-5, atol=1e-6)
            missed = before.bound > strategy.max_relative_error
            assert (report.status == int(Status.MAX_STEPS if missed else Status.CONVERGED)).all()
            assert (report.vjps == k).all()
            assert np.isnan(report.residual).all()
        counted = audit and converged.any()
        if counted:
            unit = gram / gram[0, 0]
            unit = unit * np.outer(kept := np.arange(m + 1) <= formed, kept)
            expected = rules.learn(np, before, unit[1:, 1:], unit[0, 1:], np.eye(m), now)
        elif audit:
            expected = rules.exclude(np, before)
        elif solves:
            expected = before._replace(since=before.since + 1)
        else:
            w = g
            for _ in range(k):
                w = np.einsum("bij,bi->bj", a, w)
            growth = np.mean(np.linalg.norm(w, axis=1) / np.linalg.norm(g, axis=1))
            expected = rules.grown(np, before, growth, now)
        alike = kind == "several" or n == batch
        products = 0 if not audit or gradient is None else formed + 1 + alike
        assert (report.gradient_products == products).all()
        expected = expected._replace(
            passes=before.passes + 1, vjps=before.vjps + report.vjps.max(), products=before.products + products
        )
        found, expected = (each._replace(level=np.exp(each.level)) for each in (found, expected))
        pairs = zip(found._fields, found, expected, strict=True)
        # Logarithms of errors near rounding, and the bound that has them in its exponent.
        slack = dict.fromkeys(found._fields, 2e-3) | {"deviation": 1e-2, "bound": 3e-2}
        off = [each for each in pairs if not np.allclose(*each[1:], rtol=slack[each[0]], atol=slack[each[0]])]
        assert not off, f"pass {number}: {off}"
        judged = counted and found.error >= 0
        for reported, measured in ((report.gradient_error, found.error), (report.gradient_cosine, found.cosine)):
            np.testing.assert_allclose(reported, measured if judged else np.nan, rtol=1e-5)
        kinds.add((bool(audit), bool(solves), bool(counted)))
        values = np.asarray(after, np.float32)
    exact = strategy.max_relative_error < 0.1
    assert {(True, True, True), (True, True, False), (False, exact, False)} <= kinds


@pytest.mark.parametrize("kind", ["matrix", "none"])
def test_a_pass_without_samples_counts_itself_and_nothing_else(kind):
    backend, gradient = deqcore.get_backend(backend="numpy"), GRADIENTS[kind]
    strategy, none = Adaptive(max_vjps=2), np.zeros((0, 4))
    rules, values = strategy.controller, np.asarray(strategy.init_state(), np.float32)
    a, rng = 0.4 * np.eye(4), np.random.default_rng(0)
    for g in (none, rng.standard_normal((3, 4)), none, rng.standard_normal((3, 4)), none):
        z, before = np.ones_like(g), rules.unpack(np, values)
        inputs = PassInputs(
            values, np.ones(len(g), bool), np.zeros(len(g)), gradient and (lambda u, z=z: gradient(u, z))
        )
        u, report, values = strategy.solve_with_state(backend, lambda v: v @ a, g, None, inputs)
        after = rules.unpack(np, values)
        assert u.shape == g.shape
        assert {each.shape for each in report} == {(len(g),)}
        assert np.isfinite(values).all()
        assert after.passes == before.passes + 1
        assert after.vjps - before.vjps == max(report.vjps, default=0)
        assert after.products - before.products == max(report.gradient_products, default=0)
        assert after.audits - before.audits <= bool(len(g))


@pytest.mark.parametrize(("rows", "columns"), [(40, 8), (7, 9), (300, 1), (25, 12), (64, 16)])
def test_of_a_large_parameter_every_column_has_a_say(monkeypatch, rows, columns):
    """Of `ENTRIES` numbers at most: a gradient that is in one column only is judged by what that column shows."""
    monkeypatch.setattr(powers, "ENTRIES", 32)
    backend, u = deqcore.get_backend(backend="numpy"), np.array([[1.0, -2.0], [0.5, 1.5]])
    space = KrylovSpace(backend, lambda v: 0.5 * v, shifted=True)
    first = space.begin(u, 4)
    k = space.grow(first, np.zeros(2), 1)
    for column in range(columns):
        only = np.zeros((rows, columns))
        only[:, column] = 1.0
        sound = np.ones(2, bool)
        gram, _ = powers_gram(backend, k, first.null_vector, 2 * u, sound, 2, lambda v, only=only: (np.sum(v) * only,))
        np.testing.assert_allclose(gram[0], [1.0, 0.5, 0.25], rtol=1e-9, err_msg=f"column {column}")
    assert 1 <= powers._thinned(np, only).size <= 32


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
    strategy = Adaptive(max_vjps=6, audit_rtol=0.5, fallback="none")
    values = np.asarray(strategy.init_state(), np.float32)
    inputs = PassInputs(values, np.ones(3, bool), np.zeros(3), lambda u: (u.sum(0),))
    _, report, _ = strategy.solve_with_state(backend, lambda v: v @ a, g, None, inputs)
    assert (report.vjps == 6).all()


def test_an_audit_solves_to_a_part_of_its_target_and_a_pass_without_a_state_to_rounding():
    backend, g = deqcore.get_backend(backend="numpy"), np.random.default_rng(2).standard_normal((3, 30))
    a, strategy = np.diag(np.linspace(0.0, 0.9, 30)), Adaptive(max_relative_error=0.5)
    left = lambda u: np.linalg.norm(g + u @ a - u, axis=1) / np.linalg.norm(g, axis=1)
    inputs = PassInputs(np.asarray(strategy.init_state(), np.float32), np.ones(3, bool), np.zeros(3), lambda u: (u,))
    u, report, _ = strategy.solve_with_state(backend, lambda v: v @ a, g, None, inputs)
    alone, whole = strategy.solve_adjoint(backend, lambda v: v @ a, g, None)
    assert (left(u) <= 0.01).all()
    assert (left(alone) <= 1e-7).all()
    assert (report.vjps < 0.7 * whole.vjps).all()
    np.testing.assert_allclose(report.residual, left(u), rtol=1e-3)


def test_a_solve_between_audits_ends_at_a_looser_residual():
    """The residual that the report states is the true one: audits .02 of the target, others at most .3 of it."""
    backend, rng = deqcore.get_backend(backend="numpy"), np.random.default_rng(0)
    strategy = Adaptive(max_relative_error=0.2, max_vjps=0)
    values, largest = np.asarray(strategy.init_state(), np.float32), {True: [], False: []}
    a = 0.9 * np.linalg.qr(rng.standard_normal((40, 40)))[0][None]
    for _ in range(16):
        g, z = rng.standard_normal((2, 6, 40))
        inputs = PassInputs(values, np.ones(6, bool), np.full(6, 1e-6), lambda u, z=z: matrix(u, z))
        u, report, values = strategy.solve_with_state(backend, lambda v: v @ a[0], g, None, inputs)
        true = np.linalg.norm(g + u @ a[0] - u, axis=1) / np.linalg.norm(g, axis=1)
        np.testing.assert_allclose(report.residual, true, rtol=1e-6)
        largest[bool(report.gradient_products.any())].append(true.max())
    assert max(largest[True]) <= 0.004
    assert 0.03 < max(largest[False]) <= 0.06
