"""GMRES against SciPy, dense least squares and dense solves; singular systems, breakdowns, bad samples."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse.linalg
from hypothesis import given
from hypothesis import strategies as st

from deqcore.linear.certified import solve_certified
from deqcore.linear.gmres import KrylovSpace, gmres


@pytest.fixture(autouse=True)
def _nan_is_no_warning():
    with np.errstate(all="ignore"):
        yield


def systems(seed, batch, n, spread=0.8):
    random = np.random.default_rng(seed)
    a = np.eye(n) - spread * random.standard_normal((batch, n, n)) / np.sqrt(n)
    return a, random.standard_normal((batch, n))


def product_of(be, a, dtype="float64", count=None):
    a = be.asarray(a, dtype=dtype)

    def product(v):
        if count is not None:
            count.append(1)
        return be.xp.sum(a * v[:, None, :], axis=2)

    return product


def run(be, a, b, dtype="float64", **kwargs):
    kwargs = {"rtol": 1e-10, "max_steps": 60} | kwargs
    result = gmres(be, product_of(be, a, dtype), be.asarray(b, dtype=dtype), **kwargs)
    return {name: be.to_numpy(getattr(result, name)) for name in result._fields}


def residual(a, b, x):
    return np.linalg.norm(b - np.einsum("bij,bj->bi", a, x), axis=1)


def test_a_start_far_off_costs_no_digits(be):
    """What rounding leaves is relative to the start: 1e8 times too large, it would leave 1e-7 of b."""
    a, b = systems(3, 3, 6)
    x0 = be.asarray(np.array([[1e8], [0.1], [np.nan]]) * b)
    result = gmres(be, product_of(be, a), be.asarray(b), x0, rtol=1e-12, max_steps=10)
    assert be.to_numpy(result.converged).all()
    assert (residual(a, b, be.to_numpy(result.x)) <= 1.01e-12 * np.linalg.norm(b, axis=1)).all()


@given(seed=st.integers(0, 1000), n=st.integers(1, 20))
def test_solves_what_a_dense_solver_solves(be, seed, n):
    a, b = systems(seed, 3, n)
    result = run(be, a, b)
    assert result["converged"].all()
    assert result["products"].max() <= n + 1
    expected = np.linalg.solve(a, b[..., None])[..., 0]
    scale = np.linalg.cond(a).max()
    assert np.abs(result["x"] - expected).max() <= 1e-9 * scale * np.abs(expected).max()
    # The reported residual is the true one.
    true = residual(a, b, result["x"])
    assert result["residual"] == pytest.approx(true, rel=1e-2, abs=1e-12)
    assert (true <= 1.01e-10 * np.linalg.norm(b, axis=1)).all()


@given(seed=st.integers(0, 1000))
def test_each_step_is_optimal_in_its_krylov_space(be, truth, seed):
    a, b = systems(seed, 2, 12)
    expected = [truth.krylov_residuals(a[i], b[i], 7) for i in range(2)]
    for k in range(8):
        result = run(be, a, b, rtol=0.0, max_steps=k)
        assert result["products"].tolist() == [k, k]
        for i in range(2):
            assert result["residual"][i] == pytest.approx(expected[i][k], rel=1e-9)
        assert residual(a, b, result["x"]) == pytest.approx(result["residual"], rel=1e-9)
        assert not result["converged"].any()


@pytest.mark.parametrize("k", [3, 6])
def test_agrees_with_scipy(be, k):
    a, b = systems(5, 3, 30)
    result = run(be, a, b, rtol=1e-14, max_steps=k)
    for i in range(3):
        x, _ = scipy.sparse.linalg.gmres(a[i], b[i], rtol=1e-14, restart=k, maxiter=1)
        assert result["x"][i] == pytest.approx(x, rel=1e-9, abs=1e-12)


def test_every_sample_stops_by_itself(be):
    """A diagonal matrix with k distinct eigenvalues needs k steps."""
    n, needed = 12, [1, 2, 5, 8]
    a = np.stack([np.diag(np.resize(np.linspace(1, 3, k), n)) for k in needed])
    b = np.random.default_rng(0).standard_normal((4, n))
    together = run(be, a, b, rtol=1e-9)
    assert together["products"].tolist() == needed
    assert together["converged"].all()
    for i in range(4):
        alone = run(be, a[i : i + 1], b[i : i + 1], rtol=1e-9)
        assert alone["products"][0] == needed[i]
        assert np.abs(alone["x"][0] - together["x"][i]).max() <= 1e-12 * np.abs(alone["x"]).max()


def test_a_late_check_changes_nothing(be):
    a, b = systems(2, 3, 10)
    one, late = run(be, a, b, check_every=1, rtol=1e-6), run(be, a, b, check_every=9, rtol=1e-6)
    for name in one:
        assert np.array_equal(one[name], late[name]), name


def test_starts_from_a_given_vector(be):
    a, b = systems(3, 2, 8)
    exact = np.linalg.solve(a, b[..., None])[..., 0]
    x0 = exact + 1e-3 * np.random.default_rng(0).standard_normal(exact.shape)
    result = run(be, a, b, x0=be.asarray(x0), rtol=1e-9)
    assert result["x"] == pytest.approx(exact, rel=1e-7)
    assert result["products"].max() <= 9
    count = []
    product = product_of(be, a, count=count)
    done = gmres(be, product, be.asarray(b), be.asarray(exact), rtol=1e-9, max_steps=20)
    assert be.to_numpy(done.products).tolist() == [1, 1]  # only the one that looked at the start
    assert len(count) == 1
    assert be.to_numpy(done.converged).all()


def test_no_steps_give_the_start_and_its_residual(be):
    a, b = systems(4, 2, 5)
    result = run(be, a, b, max_steps=0)
    assert not result["x"].any()
    assert result["residual"] == pytest.approx(np.linalg.norm(b, axis=1))
    assert result["products"].tolist() == [0, 0]
    assert not result["converged"].any()


def test_a_zero_right_hand_side_costs_nothing(be):
    a, b = systems(4, 3, 5)
    b[1] = 0.0
    result = run(be, a, b)
    assert result["converged"].all()
    assert result["products"][1] == 0
    assert not result["x"][1].any()
    assert result["residual"][1] == 0.0


def test_singular_systems_give_their_least_residual(be):
    n = 6
    b = np.random.default_rng(1).standard_normal((4, n))
    a = np.stack([np.diag([0.0, 1, 2, 3, 4, 5]), np.diag([0.0, 1, 2, 3, 4, 5]), np.zeros((n, n)), np.eye(n)])
    b[0, 0] = 0.0  # consistent
    b[2] = np.eye(n)[0]
    result = run(be, a, b, max_steps=30)
    assert np.isfinite(result["x"]).all()
    assert result["converged"].tolist() == [True, False, False, True]
    assert residual(a, b, result["x"])[0] <= 1e-9
    # Inconsistent: no x does better than |b₀|; a breakdown may end a little above.
    assert abs(b[1, 0]) * (1 - 1e-12) <= result["residual"][1]
    assert residual(a, b, result["x"])[1] == pytest.approx(result["residual"][1], rel=1e-6)
    assert result["residual"][2] == 1.0
    assert result["products"][2] == 1  # it noticed at once
    assert not result["x"][2].any()
    assert result["x"][3] == pytest.approx(b[3])
    assert result["products"][3] == 1


def test_more_steps_than_dimensions_do_no_harm(be):
    a, b = systems(6, 3, 4)
    result = run(be, a, b, rtol=0.0, max_steps=50)
    expected = np.linalg.solve(a, b[..., None])[..., 0]
    assert result["x"] == pytest.approx(expected, rel=1e-10)
    assert result["products"].max() <= 8


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_sample_changes_no_bit_of_its_neighbours(be, bad):
    a, b = systems(7, 4, 9)
    healthy = run(be, a, b)
    for where in ("matrix", "right-hand side"):
        broken_a, broken_b = a.copy(), b.copy()
        if where == "matrix":
            broken_a[2, 3, 3] = bad
        else:
            broken_b[2, 3] = bad
        result = run(be, broken_a, broken_b)
        assert not result["converged"][2]
        for i in (0, 1, 3):
            for name in result:
                assert np.array_equal(result[name][i], healthy[name][i]), (name, where)


def test_a_matrix_that_turns_bad_later_leaves_the_best_so_far(be):
    """A product that overflows in the third step ends that sample with its two good ones."""
    a, b = systems(8, 2, 9)
    plain, calls = product_of(be, a), []
    mask = be.asarray(np.array([[True], [False]]))

    def product(v):
        calls.append(1)
        w = plain(v)
        return be.xp.where(mask, w * float("inf"), w) if len(calls) == 3 else w

    result = gmres(be, product, be.asarray(b), rtol=1e-10, max_steps=30)
    two = run(be, a, b, rtol=1e-10, max_steps=2)
    assert be.to_numpy(result.x)[0] == pytest.approx(two["x"][0], rel=1e-12)
    assert be.to_numpy(result.residual)[0] == pytest.approx(two["residual"][0], rel=1e-12)
    assert be.to_numpy(result.converged).tolist() == [False, True]


def test_float32_reaches_what_float32_can(be):
    a, b = systems(9, 3, 40)
    result = run(be, a, b, dtype="float32", rtol=1e-5)
    assert result["x"].dtype == np.float32
    assert result["converged"].all()
    assert (residual(a, b, result["x"].astype(float)) <= 3e-5 * np.linalg.norm(b, axis=1)).all()


def test_orthogonality_is_kept_where_one_projection_loses_it(be):
    n = 40
    spectrum = np.logspace(0, -7, n)
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))
    a = ((q * spectrum) @ q.T)[None]
    b = np.random.default_rng(1).standard_normal((1, n))
    result = run(be, a, b, rtol=1e-8, max_steps=n)
    # What is left is rounding in A x: n·eps·‖A‖·‖x‖.
    rounding = n * np.finfo(float).eps * np.linalg.norm(result["x"])
    assert residual(a, b, result["x"]) == pytest.approx(result["residual"], rel=1e-3, abs=rounding)


@pytest.mark.parametrize("smallest", [0.0, 1e-12])
@pytest.mark.parametrize("n", [30, 60, 90])
def test_a_singular_matrix_is_never_called_solved(be, n, smallest):
    """The residual's recurrence alone falls to rounding here while x grows to 1e15: seen at 1e-5 for a true 0.8."""
    random = np.random.default_rng(n)
    spectrum = np.linspace(1, 60, n)
    spectrum[0] = smallest
    q = np.stack([np.linalg.qr(random.standard_normal((n, n)))[0] for _ in range(4)])
    a, b = (q * spectrum) @ q.swapaxes(1, 2), random.standard_normal((4, n))
    for rtol in (1e-4, 1e-10):
        result = run(be, a, b, rtol=rtol, max_steps=n)
        true = residual(a, b, result["x"])
        goal = rtol * np.linalg.norm(b, axis=1)
        assert not (result["converged"] & (true > 3 * goal)).any()
        assert (true <= 100 * np.maximum(result["residual"], goal)).all()


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(be, batch):
    a, b = systems(1, batch, 5)
    result = run(be, a, b)
    assert result["x"].shape == (batch, 5)
    assert result["converged"].all()


def test_right_preconditioning_keeps_residuals_true(be):
    a, b = systems(12, 2, 15)
    rough = np.linalg.inv(a) + 0.02 * np.random.default_rng(0).standard_normal(a.shape)
    result = run(be, a, b, precondition=product_of(be, rough), rtol=1e-9)
    plain = run(be, a, b, rtol=1e-9)
    assert result["converged"].all()
    assert residual(a, b, result["x"]) == pytest.approx(result["residual"], rel=1e-2)
    assert (result["products"] < plain["products"]).all()
    perfect = run(be, a, b, precondition=product_of(be, np.linalg.inv(a)), rtol=1e-9)
    assert perfect["products"].tolist() == [1, 1]


def test_the_space_knows_its_inverse_norm_and_residual_vector(be):
    a, b = systems(13, 2, 6)
    space = KrylovSpace(be, product_of(be, a))
    k = space.begin(be.asarray(b), 6)
    last = np.zeros(2)
    exact = 1 / np.linalg.svd(a, compute_uv=False)[:, -1]
    for steps in range(1, 7):
        k = space.grow(k, be.asarray(np.zeros(2)), 1)
        bound = be.to_numpy(space.inverse_norm(k))
        assert (bound <= exact * (1 + 1e-9)).all()  # a lower bound of ‖A^-1‖
        assert (bound >= last * (1 - 1e-9)).all()  # that only grows
        last = bound
        x = be.to_numpy(space.solution(k))
        r = be.to_numpy(space.residual_vector(k))
        if steps < 6:
            assert r == pytest.approx(b - np.einsum("bij,bj->bi", a, x), rel=1e-8, abs=1e-10)
    assert last == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("shifted", [False, True])
def test_figures_of_a_space_are_those_of_dense_algebra(be, shifted):
    """Samples end at other dimensions: H̄ = Vᵀ A V of each has only its own columns."""
    a, b = systems(15, 3, 12, spread=0.35)
    goals = np.array([0.3, 1e-2, 1e-5]) * np.linalg.norm(b, axis=1)
    space = KrylovSpace(be, product_of(be, np.eye(12) - a if shifted else a), shifted=shifted)
    k = space.begin(be.asarray(b), 10)
    left = [be.to_numpy(k.residual)]
    for _ in range(10):
        k = space.grow(k, be.asarray(goals), 1)
        left.append(be.to_numpy(k.residual))
    result = {name: be.to_numpy(values) for name, values in space.least_squares(k)._asdict().items()}
    x, rest = be.to_numpy(space.solution(k)), be.to_numpy(space.residual_vector(k))
    only = be.to_numpy(space.residual_vector(k, be.asarray([False, True, False])))
    steps = be.to_numpy(k.steps).tolist()
    assert 1 < steps[0] < steps[1] < steps[2] <= 10
    for i, count in enumerate(steps):
        vectors = [b[i]]
        for _ in range(count):
            vectors.append(a[i] @ vectors[-1])
        v = np.linalg.qr(np.stack(vectors).T)[0]
        h = v.T @ a[i] @ v[:, :count]
        y = np.linalg.lstsq(h, v.T @ b[i], rcond=None)[0]
        np.testing.assert_allclose(x[i], v[:, :count] @ y, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(rest[i], b[i] - a[i] @ x[i], rtol=1e-7, atol=1e-9)
        np.testing.assert_array_equal(only[i], rest[i] if i == 1 else 0 * rest[i])
        residuals = np.array([values[i] for values in left[: count + 1]])
        assert residuals[-1] == pytest.approx(np.linalg.norm(b[i] - a[i] @ x[i]), rel=1e-7)
        assert residuals[-2] > goals[i] >= residuals[-1]
        falls = residuals[1:] / residuals[:-1]
        expected = {
            "size": np.linalg.norm(x[i]),
            "inverse_norm": 1 / np.linalg.svd(h, compute_uv=False)[-1],
            "latest": falls[-1],
            "best": falls[:-1].min(),
        }
        for name, value in expected.items():
            assert result[name][i] == pytest.approx(value, rel=1e-3 if name == "inverse_norm" else 1e-6), name
        assert result["column_norm"][i] >= np.linalg.norm(h[:, 0]) * (1 - 1e-9)
        assert result["column_norm"][i] <= np.linalg.norm(h, 2) * (1 + 1e-9)


def test_a_space_that_paused_goes_on_as_if_it_had_not(be):
    """Sample 0 waits while the others grow; its next vector is then in a slot far from its last."""
    a, b = systems(14, 3, 24)
    space = KrylovSpace(be, product_of(be, a))
    norm = np.linalg.norm(b, axis=1)
    first = space.grow(space.begin(be.asarray(b), 60), be.asarray(norm * np.array([0.5, 1e-6, 1e-3])), 30)
    dimension = be.to_numpy(first.steps)
    assert dimension[0] < dimension[2] < dimension[1]
    k = space.grow(first, be.asarray(norm * np.array([1e-2, 1e-6, 1e-3])), 1)
    k = space.grow(k, be.asarray(norm * np.array([1e-2, 1e-6, 1e-3])), 30)
    for i in range(3):
        one = KrylovSpace(be, product_of(be, a[i : i + 1]))
        steps = int(be.to_numpy(k.steps)[i])
        alone = one.grow(one.begin(be.asarray(b[i : i + 1]), 24), be.asarray(np.zeros(1)), steps)
        for name in ("solution", "residual_vector", "inverse_norm"):
            together = be.to_numpy(getattr(space, name)(k))[i]
            assert together == pytest.approx(be.to_numpy(getattr(one, name)(alone))[0], rel=1e-9, abs=1e-12), name
        assert be.to_numpy(k.residual)[i] == pytest.approx(be.to_numpy(alone.residual)[0], rel=1e-9)


@given(seed=st.integers(0, 1000))
def test_a_certified_solve_does_not_depend_on_its_batch(be, seed):
    a, _ = systems(seed, 5, 12, spread=0.7)
    j = (np.eye(12) - a) * np.array([0.0, 0.3, 0.6, 0.9, 1.0])[:, None, None]
    g = np.random.default_rng(seed).standard_normal((5, 12))

    def solve(rows):
        matrix = be.asarray(j[rows])
        result = solve_certified(
            be,
            lambda u: be.xp.sum(matrix * u[:, :, None], axis=1),
            be.asarray(g[rows]),
            None,
            max_relative_error=0.02,
            max_vjps=60,
        )
        return {name: be.to_numpy(getattr(result, name)) for name in result._fields}

    together = solve(slice(None))
    true = np.linalg.norm(g + np.einsum("bij,bi->bj", j, together["u"]) - together["u"], axis=1)
    assert together["residual"] == pytest.approx(true / np.linalg.norm(g, axis=1), rel=1e-6, abs=1e-12)
    for i in range(5):
        alone = solve(slice(i, i + 1))
        assert alone["vjps"][0] == together["vjps"][i]
        assert alone["met"][0] == together["met"][i]
        assert np.abs(alone["u"][0] - together["u"][i]).max() <= 1e-10 * np.abs(alone["u"]).max()
        assert alone["error"][0] == pytest.approx(together["error"][i], rel=1e-8, abs=1e-12)


def ill_conditioned(n=40):
    """Matrices I − J whose products lie nearly in the space that made them."""
    rng = np.random.default_rng(21)
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    slow = np.concatenate([[0.9, 0.99, 0.999, 0.9999], rng.uniform(-0.3, 0.3, n - 4)])
    return np.stack(
        [
            np.eye(n) - q @ np.diag(slow) @ q.T,
            q @ np.diag(np.logspace(-8, 0, n)) @ q.T,
            np.vander(np.linspace(0, 1, n), n),
            np.eye(n) - 1e-6 * rng.standard_normal((n, n)),
        ]
    )


def test_the_basis_is_orthogonal_to_rounding_where_products_cancel(be):
    """A projection is repeated only where it leaves less than 1/√2 of the norm: ‖QᵀQ − I‖ stays some roundings."""
    a = be.asarray(ill_conditioned())
    b = be.asarray(np.random.default_rng(22).standard_normal((4, 40)))
    space = KrylovSpace(be, lambda v: be.xp.sum(a * v[:, None, :], axis=2))
    k = space.begin(b, 30)
    k = space.grow(k, 1e-12 * k.start, 30)
    for vectors in be.to_numpy(k.basis.masked(None).vectors()):
        basis = vectors[np.linalg.norm(vectors, axis=1) > 0]
        assert np.linalg.norm(basis @ basis.T - np.eye(len(basis)), 2) <= 50 * np.finfo(basis.dtype).eps
