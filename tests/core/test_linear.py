"""The small parts of the linear algebra, each against the formula of its docstring in dense NumPy."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

import deqcore
from deqcore.backward.looped import Looped
from deqcore.linear.grouped import Groups
from deqcore.linear.lowrank import RIDGE, SHARP, multisecant
from deqcore.linear.norms import CANCELLED, project, residual_norms, unmeasured
from deqcore.linear.transposed import transposed
from deqcore.testing import strict
from deqcore.testing.suite.fixtures import DenseEstimate, Kit, affine
from deqcore.types import AdjointReport, PassInputs, Status

BATCH, N = 4, 9


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def kept(be, vectors):
    """Return a history of vectors `(m, batch, n)`."""
    history = be.history(be.asarray(vectors[0]), len(vectors))
    for vector in vectors:
        history = history.append(be.asarray(vector))
    return history


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_a_projection_takes_the_components_away_and_returns_them(be, rng, twice, conditional):
    """Rows with a half of their norm in the basis, and rows with all but 1e-9 of it, which need a second projection."""
    q = np.swapaxes(np.linalg.qr(rng.standard_normal((BATCH, N, 3)))[0], 1, 2)
    inside = np.einsum("bm,bmn->bn", rng.standard_normal((BATCH, 3)), q)
    outside = rng.standard_normal((BATCH, N))
    outside -= np.einsum("bmn,bm->bn", q, np.einsum("bmn,bn->bm", q, outside))
    w = inside + np.array([2.0, 1e-9, 0.5, 1e-9])[:, None] * outside
    basis = kept(be, np.swapaxes(q, 0, 1))
    found = project(be, basis, be.asarray(w), twice, be.norm, conditional=conditional)
    rest, h, before, after = (be.to_numpy(each) for each in found)
    left = np.abs(np.einsum("bmn,bn->bm", q, rest)).max(axis=1) / np.linalg.norm(rest, axis=1)
    assert (left[[0, 2]] < 1e-14).all()
    assert ((left[[1, 3]] < 1e-13) == twice).all()
    np.testing.assert_allclose(h, np.einsum("bmn,bn->bm", q, w), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(np.einsum("bm,bmn->bn", h, q) + rest, w, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(before, np.linalg.norm(w, axis=1), rtol=1e-14)
    np.testing.assert_allclose(after, np.linalg.norm(rest, axis=1), rtol=1e-14)
    assert (after[[1, 3]] < CANCELLED * before[[1, 3]]).all()


def test_norms_are_those_of_rows_and_unmeasured_ones_are_nan(be, rng):
    z, fz = rng.standard_normal((2, BATCH, N))
    found = [be.to_numpy(each) for each in residual_norms(be, be.asarray(z), be.asarray(fz))]
    np.testing.assert_allclose(found, [np.linalg.norm(fz - z, axis=1), np.linalg.norm(fz, axis=1)], rtol=1e-14)
    for width in (1, N):
        unknown = unmeasured(be, be.asarray(z[:, :width]))
        assert be.dtype_name(unknown) == be.dtype_name(be.norm(be.asarray(z)))
        assert np.isnan(be.to_numpy(unknown)).tolist() == [True] * BATCH


def dense_multisecant(q, steps, sums, ridge):
    """H `(n, n)` of one sample by the formula of `MultisecantInverse`."""
    s, y = steps @ q, (sums - steps) @ q
    sound = (np.linalg.norm(s, axis=1) > 0) & (np.linalg.norm(y, axis=1) > 0)
    if not sound.any():
        return -np.eye(q.shape[1])
    ds, dy = (1 / np.linalg.norm(each[sound], axis=1) for each in (s, y))
    p = (ds[:, None] * s[sound]) @ (dy[:, None] * y[sound]).T
    w = np.diag(dy) @ np.linalg.solve(p.T @ p + ridge * np.eye(len(p)), p.T) @ np.diag(ds)
    return -np.eye(q.shape[1]) + (sums[sound] @ q).T @ w @ s[sound]


@pytest.mark.parametrize("pairs", [0, 1, 3])
def test_a_multisecant_estimate_is_its_formula(be, rng, pairs):
    """Also where pairs are missing: one in a sample, all in another."""
    vectors, v = rng.standard_normal((4, BATCH, N)), rng.standard_normal((BATCH, N))
    steps, differences = rng.standard_normal((2, BATCH, pairs, 4))
    steps[1, :1], steps[2] = 0.0, 0.0
    steps[3, -1:], differences[3, -1:] = 0.0, 0.0
    q = np.swapaxes(vectors, 0, 1)
    gram = np.einsum("bmn,bkn->bmk", q, q)
    made = multisecant(be, kept(be, vectors), *(be.asarray(each) for each in (gram, steps, differences)))
    for estimate in (made, made.prepared(), made.prepared().prepared()):
        for name, ridge in (("apply", RIDGE), ("apply_transpose", RIDGE), ("apply_transpose_unregularised", SHARP)):
            if estimate is not made and name.endswith("unregularised"):
                continue
            found = be.to_numpy(getattr(estimate, name)(be.asarray(v)))
            for i in range(BATCH):
                h = dense_multisecant(q[i], steps[i], steps[i] + differences[i], ridge)
                h = h if name == "apply" else h.T
                np.testing.assert_allclose(found[i], h @ v[i], rtol=1e-8, atol=1e-10, err_msg=f"{name}, sample {i}")


def test_transposed_twice_is_the_estimate_itself(be, rng):
    kit = Kit(be)
    h, v = rng.standard_normal((BATCH, N, N)), rng.standard_normal((BATCH, N))
    one = DenseEstimate(kit, be.asarray(h))
    other = transposed(one)
    np.testing.assert_allclose(be.to_numpy(other.apply(be.asarray(v))), np.einsum("bij,bi->bj", h, v), rtol=1e-12)
    expected = np.einsum("bij,bj->bi", h, v)
    np.testing.assert_allclose(be.to_numpy(other.apply_transpose(be.asarray(v))), expected, rtol=1e-12)
    assert other.known() is None
    assert transposed(other) is one


class Known(DenseEstimate):
    """An estimate that knows some rows."""

    def known(self):
        return self.kit.array([False, False, True, False, False, False], "bool")


@pytest.mark.parametrize("units", [1, 2, 3])
def test_figures_of_a_group_are_those_of_its_rows(be, rng, units):
    """Row i of 6 belongs to group i // units."""
    groups, count = Groups(be, units), 6 // units
    v, h = rng.standard_normal((6, N)), rng.standard_normal((6, N, N))
    joined = be.to_numpy(groups.join(be.asarray(v)))
    np.testing.assert_array_equal(joined, v.reshape(count, units * N))
    np.testing.assert_array_equal(be.to_numpy(groups.split(groups.join(be.asarray(v)))), v)
    rows = [np.any([i == 2 for i in range(k * units, (k + 1) * units)]) for k in range(count)]
    estimate = groups.estimate(Known(Kit(be), be.asarray(h)))
    block = np.einsum("bij,bj->bi", h, v).reshape(count, -1)
    turned = np.einsum("bij,bi->bj", h, v).reshape(count, -1)
    for each in (estimate, estimate.prepared()):
        assert be.to_numpy(each.known()).tolist() == rows
        np.testing.assert_allclose(be.to_numpy(each.apply(be.asarray(joined))), block, rtol=1e-12)
        for name in ("apply_transpose", "apply_transpose_unregularised"):
            np.testing.assert_allclose(be.to_numpy(getattr(each, name)(be.asarray(joined))), turned, rtol=1e-12)
    assert groups.estimate(DenseEstimate(Kit(be), be.asarray(h))).known() is None
    done, left = np.array([True, True, False, True, True, True]), np.arange(1.0, 7.0)
    inputs = PassInputs(None, be.asarray(done), be.asarray(left), lambda u: (be.xp.sum(u, axis=0),))
    found = groups.inputs(inputs)
    assert be.to_numpy(found.converged).tolist() == done.reshape(count, units).all(1).tolist()
    np.testing.assert_allclose(be.to_numpy(found.residual), np.linalg.norm(left.reshape(count, units), axis=1))
    np.testing.assert_allclose(be.to_numpy(found.parameter_vjp(be.asarray(joined))[0]), v.sum(0))
    assert groups.inputs(inputs._replace(parameter_vjp=None)).parameter_vjp is None
    figures = np.arange(count)
    report = AdjointReport(
        be.asarray(figures + int(Status.CONVERGED)), be.asarray(2 * figures), be.asarray(0.5 * figures),
        be.asarray(0.1 * figures), be.asarray(figures > 0),
    )  # fmt: skip
    spread = groups.spread(report)
    assert be.to_numpy(spread.vjps).tolist() == np.repeat(2 * figures, units).tolist()
    assert be.to_numpy(spread.fallback).tolist() == np.repeat(figures > 0, units).tolist()
    np.testing.assert_allclose(be.to_numpy(spread.residual), np.repeat(0.5 * figures, units))


@pytest.mark.parametrize("total", [1, 3, 4, 5, 9])
@pytest.mark.parametrize("options", [{}, {"damping": 0.6}, {"noise": 0.1, "start_noise": 0.3, "seed": 4}], ids=str)
def test_a_depth_that_is_traced_gives_the_steps_of_an_integer(rng, total, options):
    """As an array the depth takes the loop of compiled code: recorded steps may be idle at the end.

    All steps but the last four are taken without a record.
    """
    be, b, z0 = deqcore.get_backend(backend="numpy"), rng.standard_normal((3, 2)), rng.standard_normal((3, 2))
    strategy, calls = Looped(depth=8, recorded=4, measure=True, **options), []

    def f(z):
        calls.append(1)
        return np.tanh(0.5 * z) + b

    ends, repeat = [], be.autodiff.repeat
    for depth in (total, np.asarray(total)):
        calls.clear()
        without = mock.patch.object(type(be.autodiff), "repeat", side_effect=repeat)
        with mock.patch.object(Looped, "total", return_value=depth), without as repeated:
            ends.append(strategy.value_at(be, f, z0, None, None, 3))
        unrecorded = sum(int(call.args[3]) for call in repeated.call_args_list) - 2  # two measure the residual
        assert unrecorded == max(total - 4, 0)
        if depth is total:
            assert ends[0].evaluations.tolist() == [len(calls)] * 3 == [total + 2] * 3
    start = z = z0 if "noise" not in options else z0 + 0.3 * be.numbers.normal(z0, 4, (3, 0))
    first = np.tanh(0.5 * start) + b
    for i in range(total):
        z = z + options.get("damping", 1.0) * (np.tanh(0.5 * z) + b - z)
        z = z if "noise" not in options else z + 0.1 * be.numbers.normal(z, 4, (3, i + 1))
    for end in ends:
        np.testing.assert_allclose(end.z, z, rtol=1e-13)
        np.testing.assert_allclose(end.fz, np.tanh(0.5 * z) + b, rtol=1e-13)
        np.testing.assert_allclose(end.residual, np.linalg.norm(first - start, axis=1), rtol=1e-13)
        scale = np.maximum(np.linalg.norm(start, axis=1), np.linalg.norm(first, axis=1))
        np.testing.assert_allclose(end.scale, scale, rtol=1e-13)
        assert end.steps.tolist() == [total] * 3
        assert end.evaluations.tolist() == [total + 2] * 3


@pytest.mark.parametrize(
    ("options", "truncates"),
    [
        ({"depth": 4, "recorded": 4}, False),
        ({"depth": 5, "recorded": 4}, True),
        ({"depth": 2, "recorded": 4, "distribution": "poisson", "seed": 0}, True),
    ],
)
def test_a_loop_says_whether_steps_may_be_left_out_of_its_gradient(options, truncates):
    assert Looped(**options).truncates() is truncates
    assert Looped(**options).solves() is False


def test_the_value_of_a_loop_is_that_of_training_step_zero():
    be, z0 = deqcore.get_backend(backend="numpy"), np.zeros((1, 1))
    strategy = Looped(depth=6, distribution="poisson", seed=3)
    depth = int(strategy.total(be, 0, z0))
    assert depth != int(strategy.total(be, 1, z0)), "the test needs two depths"
    assert strategy.value(be, lambda z: z + 1.0, z0, None, None).z.item() == depth


@pytest.mark.parametrize(
    "options", [{}, {"history_size": 3, "max_residual_growth": 1.5}, {"history_size": 12}], ids=str
)
def test_small_systems_are_positive_where_a_solver_says_so(options):
    """On the strict backend a system that is not positive definite has no solution, and plain steps follow."""
    strict.register()
    ends = []
    for backend in ("numpy", "strict"):
        kit = Kit(deqcore.get_backend(backend=backend))
        for size in (0.6, 3.0):
            problem = affine(batch=3, n=7, norm=size, seed=2)
            z0 = kit.array(np.zeros((3, 7)))
            sol = kit.solve(kit.map(problem), z0, solver="anderson", rtol=1e-8, max_steps=40, options=options)
            ends.append(kit.numpy(sol.steps).tolist())
    assert ends[:2] == ends[2:]
    systems, one = np.stack([np.diag([2.0, 4.0]), np.diag([2.0, -4.0])]), np.ones((2, 2))
    found = kit.numpy(kit.backend.linalg.solve_positive(kit.array(systems), kit.array(one)))
    np.testing.assert_array_equal(found, [[0.5, 0.25], [np.nan, np.nan]])
