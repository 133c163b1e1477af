"""Broyden's safeguard: steps that make it worse are refused, and the formulas stay right."""

from __future__ import annotations

import re

import numpy as np
import pytest

import deqcore
from deqcore.errors import ConfigError
from deqcore.solvers.broyden import Broyden


@pytest.fixture(autouse=True)
def _no_warnings_from_f():
    with np.errstate(all="ignore"):
        yield


def cubic(be, seeds, size=20):
    """The map x − 4 z³ − W z / 2 on a batch of seeds, and its starting point."""
    rng = [np.random.default_rng(seed) for seed in seeds]
    w = be.asarray(np.stack([r.standard_normal((size, size)) for r in rng]) / np.sqrt(size))
    x = be.asarray(np.stack([r.standard_normal(size) for r in rng]))
    return lambda z: x - 4.0 * z * z * z - 0.5 * be.xp.sum(w * z[:, None, :], axis=2), 0.0 * x


def solve(f, z0, max_residual_growth, history_size=30, **settings):
    options = (
        {"history_size": history_size}
        if max_residual_growth is None
        else {"max_residual_growth": max_residual_growth, "history_size": history_size}
    )
    return deqcore.fixed_point(
        f,
        z0,
        forward__solver="broyden",
        forward__options=options,
        forward__rtol=1e-9,
        forward__max_steps=200,
        forward__on_failure="ignore",
        **settings,
    )


@pytest.mark.parametrize("history_size", [12, 30])
def test_more_problems_are_solved_with_it(be, history_size):
    f, z0 = cubic(be, range(12))
    plain, guarded = solve(f, z0, None, history_size), solve(f, z0, 2.0, history_size)
    assert be.to_numpy(plain.converged).sum() < 12
    assert be.to_numpy(guarded.converged).all()
    z = guarded.value
    assert be.to_numpy(be.norm(f(z) - z)).max() < 1e-7


@pytest.mark.parametrize("history_size", [3, 6, 30])
def test_the_secant_equation_holds_for_refused_and_for_damped_steps(be, history_size):
    f, z = cubic(be, range(12))
    tried = []

    def watched(z):
        tried.append(z)
        return f(z)

    solver = Broyden(max_residual_growth=2.0, history_size=history_size)
    fz = f(z)
    state = solver.init(be, z, fz)
    refused, damped = 0, 0
    for _ in range(25):
        length = be.to_numpy(state.guard[0])
        new_z, new_fz, new = solver.step(be, watched, z, fz, state)
        s, g = tried[-1] - z, fz - z
        y = f(tried[-1]) - tried[-1] - g
        h = solver.inverse_jacobian(be, new)
        miss = be.to_numpy(be.norm(h.apply(y) - s) / be.norm(s))
        stayed = be.to_numpy(be.norm(new_z - z)) == 0.0
        sound = be.to_numpy(be.norm(g)) > 1e-7  # below it y is rounding
        assert miss[sound].max(initial=0.0) < 1e-6
        full = be.to_numpy(new.basis.combine(new.step) + h.apply(new_fz - new_z))
        scale = be.to_numpy(be.norm(new_fz - new_z))
        assert (np.linalg.norm(full, axis=1)[sound] <= 1e-6 * scale[sound] + 1e-9).all(), "the next step is −H g"
        refused, damped = refused + stayed[sound].sum(), damped + (length[sound] < 1.0).sum()
        z, fz, state = new_z, new_fz, new
    assert refused > 5
    assert damped > 5


def test_a_step_to_where_f_is_not_finite_is_refused(be):
    """sqrt(z) = 1/2 by z ← z − 3 (sqrt(z) − 1/2): the first step leads below zero, where f is NaN."""
    z0 = be.asarray(np.array([[4.0], [0.3]]))
    f = lambda z: z - 3.0 * (be.xp.sqrt(z) - 0.5)
    for max_residual_growth in (None, 2.0):
        found = solve(f, z0, max_residual_growth)
        assert be.to_numpy(found.converged).all()
        np.testing.assert_allclose(be.to_numpy(found.value), 0.25, atol=1e-7)


def test_a_residual_whose_square_overflows_spoils_nothing(be):
    """F(z) = sinh(200 z) − 1 from z = 0: a full step would land at sinh(200) and later ones near 1e300."""
    f = lambda z: z - (be.xp.sinh(200.0 * z) - 1.0)
    z0 = be.asarray(np.array([[0.0], [2.0]]))
    guarded = solve(f, z0, 2.0)
    assert be.to_numpy(guarded.converged)[0]
    np.testing.assert_allclose(be.to_numpy(guarded.value)[0], np.arcsinh(1.0) / 200.0, rtol=1e-8)
    assert np.isfinite(be.to_numpy(guarded.value)).all()


def test_a_sample_that_is_refused_changes_nothing_for_its_mates():
    be = deqcore.get_backend(backend="numpy")
    together = solve(*cubic(be, range(8)), 2.0, history_size=5)
    for seed in (0, 3, 7):
        alone = solve(*cubic(be, [seed]), 2.0, history_size=5)
        assert alone.steps[0] == together.steps[seed]
        np.testing.assert_allclose(alone.value[0], together.value[seed], rtol=1e-12, atol=1e-14)


def test_where_nothing_grows_it_changes_nothing(be):
    a = 0.3 * np.eye(6) + 0.1 * np.random.default_rng(0).standard_normal((6, 6))
    w, b = be.asarray(a), be.asarray(np.ones((2, 6)))
    f = lambda z: be.xp.matmul(z, w.T) + b
    plain, guarded = solve(f, 0.0 * b, None), solve(f, 0.0 * b, 2.0)
    np.testing.assert_array_equal(be.to_numpy(plain.steps), be.to_numpy(guarded.steps))
    np.testing.assert_allclose(be.to_numpy(guarded.value)[0], np.linalg.solve(np.eye(6) - a, np.ones(6)), rtol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_residual_growth": 0.5},
            "max_residual_growth must be None or a finite number of at least 1 (got 0.5)",
        ),
        (
            {"max_residual_growth": float("inf")},
            "max_residual_growth must be None or a finite number of at least 1 (got inf)",
        ),
        (
            {"max_residual_growth": float("nan")},
            "max_residual_growth must be None or a finite number of at least 1 (got nan)",
        ),
        (
            {"max_residual_growth": 2.0, "history_size": 2},
            "history_size must be at least 3 with max_residual_growth = 2.0",
        ),
        ({"max_residual_growth": "much"}, "max_residual_growth must be of type float | None (got 'much')"),
    ],
)
def test_options_out_of_range_are_refused(be, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        deqcore.fixed_point(
            lambda z: 0.5 * z, be.asarray(np.ones((1, 2))), forward__solver="broyden", forward__options=options
        )


def test_compiled_it_is_the_same_method():
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        f, z0 = cubic(deqcore.get_backend(backend="jax"), range(4))
        compiled = solve(f, z0, 2.0, history_size=12)
        eager = solve(*cubic(deqcore.get_backend(backend="numpy"), range(4)), 2.0, history_size=12)
        assert np.asarray(compiled.converged).all()
        np.testing.assert_allclose(compiled.value, eager.value, atol=1e-7)
        assert np.abs(np.asarray(compiled.steps) - eager.steps).max() <= 5
