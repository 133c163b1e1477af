"""Plain steps before GMRES, against `numpy.linalg.solve`: contracting, slow, expanding and bad samples."""

from __future__ import annotations

import numpy as np
import pytest

from deqcore.backward.exact_ift import ExactIFT
from deqcore.linear import opening
from deqcore.linear.opening import opened
from deqcore.testing.strict.backend import StrictBackend
from deqcore.types import Status

RATES = (0.3, 0.5, 0.9, 3.0)
"""Rates of contraction of the samples: GMRES continues the last two."""


@pytest.fixture(autouse=True)
def _nan_is_no_warning():
    with np.errstate(all="ignore"):
        yield


def systems(rates=RATES, n=20, seed=0):
    """J `(batch, n, n)` with these rates, b, and (I − J)^-1 b."""
    rng = np.random.default_rng(seed)
    j = np.linalg.qr(rng.standard_normal((len(rates), n, n)))[0] * np.asarray(rates)[:, None, None]
    b = rng.standard_normal((len(rates), n))
    return j, b, np.linalg.solve(np.eye(n) - j, b[:, :, None])[:, :, 0]


def solved(be, j, b, dtype="float64", calls=None, **options):
    options = {"rtol": 1e-6, "max_steps": 60, "reorthogonalize": True, "restart": 40} | options
    stored = be.asarray(j, dtype=dtype)

    def product(v):
        if calls is not None:
            calls.append(1)
        return be.xp.sum(stored * v[:, None, :], axis=2)

    result = opened(be, product, be.asarray(b, dtype=dtype), **options)
    return {name: be.to_numpy(getattr(result, name)) for name in result._fields}


def left(j, b, x):
    return np.linalg.norm(b - x + np.einsum("bij,bj->bi", j, x), axis=1) / np.linalg.norm(b, axis=1)


def test_samples_of_all_rates_are_solved_and_their_residual_is_the_true_one(be):
    j, b, exact = systems()
    result = solved(be, j, b)
    assert result["converged"].all()
    assert (left(j, b, result["x"]) <= 1.001e-6).all()
    assert result["residual"] / np.linalg.norm(b, axis=1) == pytest.approx(left(j, b, result["x"]), abs=1e-12)
    assert np.abs(result["x"] - exact).max() <= 1e-4
    # A multiple of an orthogonal matrix leaves exactly this part in each step.
    assert result["products"][:2].tolist() == [np.ceil(np.log(1e-6) / np.log(rate)) for rate in RATES[:2]]


def test_a_sample_does_not_depend_on_its_batch_mates(be):
    """Fast ones end before slow ones begin with GMRES, and the counts are their own."""
    j, b, _ = systems()
    together = solved(be, j, b)
    for row in range(len(RATES)):
        alone = solved(be, j[row : row + 1], b[row : row + 1])
        assert alone["products"] == together["products"][row : row + 1]
        assert alone["x"][0] == pytest.approx(together["x"][row], rel=1e-12)


def test_a_batch_that_contracts_needs_no_basis(be, monkeypatch):
    j, b, _ = systems(RATES[:2])
    calls = []
    monkeypatch.setattr(type(be), "history", lambda *_, **__: pytest.fail("a basis was allocated"))
    result = solved(be, j, b, calls=calls)
    assert result["converged"].all()
    assert len(calls) == result["products"].max()


def test_an_expanding_sample_loses_one_product(be):
    """Its only plain step is not taken, so that GMRES begins at zero."""
    j, b, _ = systems(RATES[3:], n=6)
    result = solved(be, j, b)
    assert result["converged"].all()
    assert result["products"].tolist() == [7]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_cotangent_stays_in_its_row(be, bad):
    j, b, _ = systems()
    expected = solved(be, j, b)
    b[1, 3] = bad
    result = solved(be, j, b)
    assert result["converged"].tolist() == [True, False, True, True]
    assert np.isnan(result["x"][1]).all()
    assert result["x"][[0, 2, 3]] == pytest.approx(expected["x"][[0, 2, 3]], rel=1e-10)


def test_a_product_that_is_not_finite_fails(be):
    j, b, _ = systems()
    j[0, 0, 0] = np.nan
    result = solved(be, j, b)
    assert result["converged"].tolist() == [False, True, True, True]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_changes_nothing(be, scale):
    """Squares of such numbers leave the range of float32."""
    j, b, exact = systems()
    b32 = b.astype(np.float32)
    plain = solved(be, j, b32, "float32", rtol=1e-4)
    result = solved(be, j, b32 * np.float32(scale), "float32", rtol=1e-4)
    assert result["converged"].all()
    assert result["products"].tolist() == plain["products"].tolist()
    assert np.abs(result["x"] / scale - exact).max() <= 2e-3 * np.abs(exact).max()


def test_a_tolerance_below_rounding_is_not_reported_as_met(be):
    j, b, _ = systems(RATES[:2])
    result = solved(be, j, b, "float32", rtol=1e-9)
    assert not result["converged"].any()


def test_the_strategy_opens_in_traced_code_with_enough_unknowns_and_no_budget(monkeypatch):
    strict = StrictBackend()
    taken = []
    monkeypatch.setattr(
        "deqcore.backward.exact_ift.opened", lambda *args, **kwargs: (taken.append(1), opened(*args, **kwargs))[1]
    )

    def run(n, **options):
        g = strict.asarray(np.random.default_rng(0).standard_normal((2, n)))
        _, report = ExactIFT(**options).solve_adjoint(strict, lambda u: 0.4 * u, g, None)
        assert (strict.to_numpy(report.status) == Status.CONVERGED).all()
        return int(strict.to_numpy(report.vjps).max())

    assert run(opening.UNKNOWNS) > 10
    assert taken
    taken.clear()
    assert run(opening.UNKNOWNS - 1) == 1
    assert run(opening.UNKNOWNS, max_steps=20) == 1
    assert run(opening.UNKNOWNS, options={"opening": False}) == 1
    assert not taken


def test_the_residual_of_half_precision_contains_the_rounding_of_the_sum(be):
    """A slow mode that the cotangent hardly has: the steps become too small to be added in float16."""
    rates, rng = np.full((8, 128), 0.3), np.random.default_rng(1)
    rates[:, 0] = np.linspace(0.9, 0.97, 8)
    b = rng.standard_normal(rates.shape)
    b[:, 0] = 0.04
    d, g = be.asarray(rates, dtype="float16"), be.asarray(b, dtype="float16")
    result = opened(be, lambda v: d * v, g, rtol=2e-3, max_steps=60, reorthogonalize=True, restart=40)
    d, g, x = (be.to_numpy(array).astype(float) for array in (d, g, result.x))
    true = np.linalg.norm(g - x + d * x, axis=1)
    assert be.to_numpy(result.converged).all()
    assert (true <= np.maximum(1.01 * be.to_numpy(result.residual), 2e-3 * np.linalg.norm(g, axis=1))).all()
