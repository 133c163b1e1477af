"""Adjoint systems that GMRES cannot solve, against `numpy.linalg.solve`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import deqcore
from deqcore import plugins
from deqcore.backward.exact_ift import ExactIFT
from deqcore.errors import ConfigError
from deqcore.linear import direct
from deqcore.linear.gmres import gmres
from deqcore.types import Status


@pytest.fixture(autouse=True)
def _nan_is_no_warning():
    with np.errstate(all="ignore"):
        yield


def hard(n, batch=None, seed=0, slowest=0.9999):
    """Symmetric matrices with eigenvalues from .3 to `slowest`, and cotangents."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((n, n) if batch is None else (batch, n, n)))[0]
    matrix = q @ np.diag(np.linspace(0.3, slowest, n)) @ np.swapaxes(q, -1, -2)
    return matrix, rng.standard_normal((3 if batch is None else batch, n))


def solution(matrix, g):
    """(I − Jᵀ)^-1 g, sample by sample."""
    a = np.eye(g.shape[1]) - np.swapaxes(matrix, -1, -2)
    return np.stack([np.linalg.solve(a if a.ndim == 2 else a[i], each) for i, each in enumerate(g)])


def routed(be, matrix, g, **options):
    """U, report and calls of the product, on the host."""
    stored, calls = be.asarray(matrix), []

    def vjp(u):
        calls.append(1)
        return be.xp.sum(stored * u[:, :, None], axis=1)

    u, report = ExactIFT(**options).solve_adjoint(be, vjp, be.asarray(g), None)
    return be.to_numpy(u), type(report)(*(be.to_numpy(leaf) for leaf in report)), len(calls)


def relative(u, expected):
    return np.linalg.norm(u - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


def test_the_gradient_of_a_stiff_layer_is_right(be):
    """200 unknowns, condition 7000, z0 at the solution: forty products leave it wrong by 89 %."""
    matrix, g = hard(200)
    stored = be.asarray(matrix)
    zeros = be.asarray(np.zeros((3, 200)))
    _, (dx,) = deqcore.vjp(
        lambda z, x: be.xp.matmul(z, stored.T) + x,
        zeros,
        zeros,
        cotangent=be.asarray(g),
        backward__strategy="exact-ift",
        backward__options={"rtol": 1e-8},
    )
    assert (relative(be.to_numpy(dx), solution(matrix, g)) <= 1e-5).all()


def test_one_system_for_the_whole_state(be):
    """With batch = false the state is one system, of 12 × 25 unknowns."""
    matrix, g = hard(300)
    stored = be.asarray(matrix)
    zeros = be.asarray(np.zeros((12, 25)))
    _, (dx,) = deqcore.vjp(
        lambda z, x: be.xp.reshape(be.xp.matmul(stored, be.xp.reshape(z, (-1,))), (12, 25)) + x,
        zeros,
        zeros,
        cotangent=be.asarray(g[0].reshape(12, 25)),
        forward__batch=False,
        backward__strategy="exact-ift",
        backward__options={"rtol": 1e-8},
    )
    assert relative(be.to_numpy(dx).ravel(), solution(matrix, g[:1])[0]) <= 1e-5


def test_only_samples_that_failed_are_solved_directly_and_pay_for_it(be):
    matrix, g = hard(60, 4)
    matrix[[0, 2]] *= 0.3
    u, report, _ = routed(be, matrix, g, rtol=1e-9)
    assert report.status.tolist() == [Status.CONVERGED] * 4
    assert (relative(u, solution(matrix, g)) <= 1e-5).all()
    assert (report.vjps[[0, 2]] <= 40).all()
    assert (report.vjps[[1, 3]] > 61).all()
    easy = routed(be, matrix[[0, 2]], g[[0, 2]], rtol=1e-9)[0]
    assert u[[0, 2]] == pytest.approx(easy, rel=1e-12, abs=1e-14)


def test_products_are_counted_and_the_residual_is_measured():
    be = deqcore.get_backend(backend="numpy")
    matrix, g = hard(60, 1)
    u, report, calls = routed(be, matrix, g, rtol=1e-10)
    assert report.vjps[0] == calls > 61
    left = np.linalg.norm(g + np.einsum("bij,bi->bj", matrix, u) - u) / np.linalg.norm(g)
    assert left * (1 - 1e-3) <= report.residual[0] <= 1e-10


@pytest.mark.parametrize("entries", [1, 2 * 60 * 60, 3 * 60 * 60])
def test_a_batch_solved_in_parts_is_solved_as_whole(be, monkeypatch, entries):
    matrix, g = hard(60, 5)
    matrix[1] *= 0.2
    whole, report, _ = routed(be, matrix, g, rtol=1e-10)
    assert (report.vjps > 60).tolist() == [True, False, True, True, True]  # GMRES alone solves one of them
    monkeypatch.setattr(direct, "ENTRIES", entries)
    parts, again, _ = routed(be, matrix, g, rtol=1e-10)
    assert parts == pytest.approx(whole, rel=1e-6)
    assert again.vjps.tolist() == report.vjps.tolist()
    assert again.status.tolist() == report.status.tolist() == [Status.CONVERGED] * 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_bad_cotangent_stays_in_its_row(be, bad):
    matrix, g = hard(50, 3)
    healthy, _, _ = routed(be, matrix, g, rtol=1e-10)
    g[1] = bad
    u, report, _ = routed(be, matrix, g, rtol=1e-10)
    np.testing.assert_array_equal(u[[0, 2]], healthy[[0, 2]])
    assert report.status[1] == (Status.CONVERGED if bad == 0.0 else Status.NONFINITE)
    assert report.vjps[1] == 0 or not np.isfinite(g[1]).all()


def test_a_nan_in_one_product_stays_in_its_row(be):
    matrix, g = hard(50, 3)
    healthy, _, _ = routed(be, matrix, g, rtol=1e-10)
    matrix[1, 3, 4] = np.nan
    u, report, _ = routed(be, matrix, g, rtol=1e-10)
    np.testing.assert_array_equal(u[[0, 2]], healthy[[0, 2]])
    assert report.status.tolist()[0::2] == [Status.CONVERGED] * 2
    assert report.status[1] != int(Status.CONVERGED)


def test_a_singular_system_keeps_its_failure(be):
    matrix, g = hard(40, 2, slowest=1.0)
    matrix[1] *= 0.5
    u, report, _ = routed(be, matrix, g, rtol=1e-9)
    assert report.status.tolist() == [Status.STALLED, Status.CONVERGED]
    assert np.isfinite(u).all()
    assert report.residual[0] > 1e-9


def test_one_unknown(be):
    u, report, _ = routed(be, np.array([[[0.999999]], [[1.0]], [[-3.0]]]), np.ones((3, 1)), rtol=1e-8)
    assert u[[0, 2], 0] == pytest.approx([1e6, 0.25], rel=1e-6)
    assert report.status.tolist() == [Status.CONVERGED, Status.STALLED, Status.CONVERGED]


def test_budgets_are_kept(be):
    """A number of steps is for all products; larger systems, and a `direct` of 0, get GMRES only."""
    matrix, g = hard(60, 2)
    for options in ({"max_steps": 45}, {"max_steps": 100}, {"direct": 0}, {"direct": 59}):
        _, report, _ = routed(be, matrix, g, rtol=1e-11, **options)
        assert (report.vjps <= options.get("max_steps", 68)).all(), options
        assert not (report.status == int(Status.CONVERGED)).any(), options
    u, report, _ = routed(be, matrix, g, rtol=1e-10, max_steps=140)
    assert report.status.tolist() == [Status.CONVERGED] * 2
    assert (relative(u, solution(matrix, g)) <= 1e-5).all()


@pytest.mark.parametrize("option", [{"direct": -1}, {"max_steps": -1}, {"max_steps": "few"}])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ConfigError, match=next(iter(option))):
        plugins.make_strategy("exact-ift", option)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), restart=st.integers(2, 12), rho=st.floats(0.1, 0.9))
def test_restarts_solve_what_contracts(seed, restart, rho):
    """Each space begins where the last one ended: the residual that is reported is the true one, and falls."""
    be = deqcore.get_backend(backend="numpy")
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((3, 30, 30))
    matrix *= rho / np.linalg.norm(matrix, 2, axis=(1, 2))[:, None, None]
    g = rng.standard_normal((3, 30))
    calls = []

    def product(v):
        calls.append(1)
        return v - np.einsum("bij,bj->bi", matrix, v)

    found = gmres(be, product, g, rtol=1e-8, max_steps=400, restart=restart)
    left = np.linalg.norm(g - found.x + np.einsum("bij,bj->bi", matrix, found.x), axis=1)
    assert found.converged.all()
    assert left == pytest.approx(found.residual, rel=1e-4, abs=1e-13)
    assert (left <= 1.01e-8 * np.linalg.norm(g, axis=1)).all()
    assert found.products.max() == len(calls)
    alone = gmres(be, lambda v: v - np.einsum("bij,bj->bi", matrix[:1], v), g[:1], rtol=1e-8, max_steps=400,
                  restart=restart)  # fmt: skip
    assert alone.products[0] == found.products[0]
    assert alone.x[0] == pytest.approx(found.x[0], rel=1e-9)


def test_a_space_that_leads_nowhere_is_the_last():
    """A cyclic shift gives no smaller residual before n products: restarted, it never would."""
    be = deqcore.get_backend(backend="numpy")
    g = np.zeros((1, 50))
    g[0, 0] = 1.0
    found = gmres(be, lambda v: np.roll(v, 1, axis=1), g, rtol=1e-6, max_steps=200, restart=20)
    assert not found.converged.any()
    assert found.products.tolist() == [20]
