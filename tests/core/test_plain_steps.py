"""Plain steps beside GMRES on the host, against `numpy.linalg.solve`: turning, symmetric, slow and bad samples."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.backward.exact_ift import ExactIFT
from deqcore.linear import plain_steps
from deqcore.linear.gmres import KrylovSpace, gmres
from deqcore.linear.plain_steps import LOOK, MANY, plain_or_gmres
from deqcore.types import Status

N = 128
KINDS = ("turning", "symmetric", "hidden", "fast", "expanding", "ring")
"""Plain steps suit the first, the fourth, and the third as long as its slow mode does not show."""


@pytest.fixture(autouse=True)
def _nan_is_no_warning():
    with np.errstate(all="ignore"):
        yield


def matrix(kind, rng):
    rotation = np.linalg.qr(rng.standard_normal((N, N)))[0]
    if kind == "symmetric":
        return rotation * np.linspace(-0.6, 0.6, N) @ rotation.T
    if kind == "ring":
        return 0.8 * np.roll(np.eye(N), 1, 0)
    if kind == "hidden":
        mode = np.eye(N)[0]
        others = np.eye(N) - np.outer(mode, mode)
        return others @ (0.5 * rotation) @ others + 0.97 * np.outer(mode, mode)
    if kind == "expanding":
        return rotation * np.resize([3.0, 2.0, -1.0, 0.5], N) @ rotation.T
    return {"turning": 0.5, "fast": 0.2, "growing": 1.5}[kind] * rotation


def systems(kinds=KINDS, seed=0):
    """J `(batch, n, n)`, b, and (I − J)^-1 b. The hidden slow mode is a five-hundredth of b."""
    rng = np.random.default_rng(seed)
    j, b = np.stack([matrix(kind, rng) for kind in kinds]), rng.standard_normal((len(kinds), N))
    b[:, 0] = 0.002 * np.sqrt(N)
    return j, b, np.linalg.solve(np.eye(N) - j, b[:, :, None])[:, :, 0]


def solved(be, j, b, dtype="float64", calls=None, method=plain_or_gmres, **options):
    options = {"rtol": 1e-6, "max_steps": 150, "reorthogonalize": True, "restart": 40} | options
    stored = be.asarray(j, dtype=dtype)

    def product(v):
        if calls is not None:
            calls.append(1)
        return be.xp.matmul(stored, v[:, :, None])[:, :, 0]

    result = method(be, product, be.asarray(b, dtype=dtype), **options)
    return {name: be.to_numpy(getattr(result, name)) for name in result._fields}


def left(j, b, x):
    return np.linalg.norm(b - x + np.einsum("bij,bj->bi", j, x), axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture
def steps(monkeypatch):
    """Count the samples that take each plain step."""
    counts = []
    step = plain_steps._Plain._step

    def counted(self, image):
        counts.append(int(self.running.sum()))
        step(self, image)

    monkeypatch.setattr(plain_steps._Plain, "_step", counted)
    return counts


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-10])
def test_samples_of_all_kinds_are_solved_and_their_residual_is_the_true_one(be, steps, rtol):
    j, b, exact = systems()
    result, plain = solved(be, j, b, rtol=rtol), solved(be, j, b, rtol=rtol, method=gmres, shifted=True)
    assert result["converged"].all()
    assert (left(j, b, result["x"]) <= 1.001 * rtol).all()
    assert result["residual"] / np.linalg.norm(b, axis=1) == pytest.approx(left(j, b, result["x"]), abs=1e-12)
    assert np.abs(result["x"] - exact).max() <= 1e3 * rtol
    assert (result["products"] <= plain["products"] + 3).all()
    assert max(steps) >= 2


def test_samples_that_turn_grow_no_basis(be, monkeypatch):
    j, b, _ = systems(("turning", "fast"))
    calls, dimensions = [], []
    grow = KrylovSpace.grow
    monkeypatch.setattr(
        KrylovSpace, "grow", lambda *args, **kwargs: dimensions.append(grow(*args, **kwargs)) or dimensions[-1]
    )
    result = solved(be, j, b, calls=calls)
    assert result["converged"].all()
    assert max(int(be.to_numpy(k.dimension)) for k in dimensions) == LOOK
    assert len(calls) == result["products"].max()


def test_symmetric_and_slow_samples_take_the_steps_of_gmres(be, steps):
    j, b, _ = systems(("symmetric", "ring", "expanding", "growing"))
    result, plain = solved(be, j, b), solved(be, j, b, method=gmres, shifted=True)
    assert result["products"].tolist() == plain["products"].tolist()
    assert result["x"] == pytest.approx(plain["x"], rel=1e-9, abs=1e-9)
    assert not steps


def test_samples_with_plain_steps_ride_along(be):
    """No sample waits for another, except that without fused kernels one that returns waits for a space of its own."""
    j, b, _ = systems(("turning", "symmetric", "ring", "fast"))
    calls = []
    result = solved(be, j, b, calls=calls)
    assert result["converged"].all()
    assert len(calls) == result["products"].max()


def test_a_sample_that_returns_joins_the_space_of_the_others(steps):
    pytest.importorskip("torch")
    be = deqcore.get_backend(backend="torch")
    j, b, _ = systems(("hidden", "ring"))
    calls = []
    result = solved(be, j, b, calls=calls)
    assert result["converged"].all()
    assert (left(j, b, result["x"]) <= 1.001e-6).all()
    assert steps
    assert len(calls) == result["products"].max()


def shifted(weights, b, **options):
    """Solve x = b + J x, with J v = w v, moved by one entry, and all of b in the first entry."""
    be = deqcore.get_backend(backend="torch")
    stored, first = be.asarray(weights), np.zeros(weights.shape)
    first[:, 0] = b
    options = {"rtol": 1e-10, "max_steps": 200, "reorthogonalize": True, "restart": 40} | options
    result = plain_or_gmres(be, lambda v: be.xp.roll(stored * v, 1, axis=1), be.asarray(first), **options)
    return be.to_numpy(result.converged).tolist(), be.to_numpy(result.products).tolist()


def test_a_sample_that_joins_at_the_last_dimension_begins_again(steps):
    """Its one dimension gains a twentieth where J triples the residual. A whole space that gains this little stalls."""
    pytest.importorskip("torch")
    weights = np.full((2, 700), 0.6)
    weights[1] = 0.97
    for tripled in (37, 38, 39):
        weights[0] = 0.6
        weights[0, tripled] = 3.0
        converged, products = shifted(weights, 1.0)
        assert converged == [True, False]
        assert products[0] <= 52
    assert steps


def test_the_steps_before_a_sample_left_are_not_in_its_budget(steps):
    """Five whole spaces remain for a sample that returns, as for one that never left."""
    pytest.importorskip("torch")
    weights = np.full((1, 700), 0.6)
    weights[0, 10:] = 0.97
    _, products = shifted(weights, 1.0)
    assert products[0] >= 200
    assert steps


def test_a_sample_does_not_depend_on_its_batch_mates(be):
    j, b, _ = systems()
    together = solved(be, j, b)
    for row in range(len(KINDS)):
        alone = solved(be, j[row : row + 1], b[row : row + 1])
        assert alone["products"] == together["products"][row : row + 1], KINDS[row]
        assert alone["x"][0] == pytest.approx(together["x"][row], rel=1e-9, abs=1e-9)


def test_a_sample_that_does_not_return_has_the_same_bits_in_any_batch():
    pytest.importorskip("torch")
    be = deqcore.get_backend(backend="torch")
    right, left = np.array([[0.5, 0.3, 0.9, 0.2, 0.45], [0.0, 0.3, 0.0, 0.1, 0.01]])[:, :, None]
    g = np.random.default_rng(0).standard_normal((5, MANY))

    def run(rows):
        a, c = be.asarray(right[rows]), be.asarray(left[rows])
        product = lambda v: a * be.xp.roll(v, 1, axis=1) + c * be.xp.roll(v, -1, axis=1)
        options = {"rtol": 1e-6, "max_steps": 150, "reorthogonalize": True, "restart": 40}
        result = plain_or_gmres(be, product, be.asarray(g[rows]), **options)
        return {name: be.to_numpy(getattr(result, name)) for name in result._fields}

    together = run(slice(None))
    for row in range(5):
        for name, value in run(slice(row, row + 1)).items():
            assert np.array_equal(value[0], together[name][row]), (row, name)


def test_fused_kernels_do_what_operations_do(monkeypatch):
    pytest.importorskip("torch")
    be = deqcore.get_backend(backend="torch")
    j, b, _ = systems()
    fused = solved(be, j, b)
    monkeypatch.setattr(be, "kernels", None)
    result = solved(be, j, b)
    assert result["products"].tolist() == fused["products"].tolist()
    assert result["x"] == pytest.approx(fused["x"], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("row", range(4))
def test_a_bad_cotangent_or_product_stays_in_its_row(be, bad, row):
    j, b, _ = systems()
    expected = solved(be, j, b)
    others = np.arange(len(KINDS)) != row
    for array, index in ((b, (row, 3)), (j, (row, 0, 0))):
        before, array[index] = array[index], bad
        result = solved(be, j, b)
        array[index] = before
        assert not result["converged"][row]
        assert result["converged"][others].all()
        assert result["x"][others] == pytest.approx(expected["x"][others], rel=1e-9, abs=1e-9)


def test_a_product_that_becomes_bad_returns_to_gmres_and_fails(be):
    """Its iterate stays the last one that was finite."""
    j, b, _ = systems(("turning", "fast", "symmetric"))
    stored, calls = be.asarray(j), []

    def product(v):
        calls.append(1)
        image = be.xp.matmul(stored, v[:, :, None])[:, :, 0]
        return (
            image if len(calls) < LOOK + 3 else be.select(be.asarray([True, False, False]), 0 * image + np.nan, image)
        )

    result = plain_or_gmres(be, product, be.asarray(b), rtol=1e-6, max_steps=150, reorthogonalize=True, restart=40)
    assert be.to_numpy(result.converged).tolist() == [False, True, True]
    assert (left(j, b, be.to_numpy(result.x))[1:] <= 1.001e-6).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_changes_nothing(be, scale):
    """Squares of such numbers leave the range of float32."""
    j, b, exact = systems()
    b32 = b.astype(np.float32)
    plain = solved(be, j, b32, "float32", rtol=1e-4)
    result = solved(be, j, b32 * np.float32(scale), "float32", rtol=1e-4)
    assert result["converged"].all()
    assert np.abs(result["products"] - plain["products"]).max() <= 1
    assert np.abs(result["x"] / scale - exact).max() <= 5e-2


def test_a_tolerance_below_rounding_is_not_reported_as_met(be):
    j, b, _ = systems(("turning", "fast"))
    assert not solved(be, j, b, "float32", rtol=1e-9)["converged"].any()


def test_no_right_hand_side_costs_nothing(be):
    j, b, _ = systems()
    b[[0, 3]] = 0.0
    result = solved(be, j, b)
    assert result["converged"].all()
    assert result["products"][[0, 3]].tolist() == [0, 0]
    assert not result["x"][[0, 3]].any()


@pytest.mark.parametrize(("n", "options", "dtype", "opened"), [
    (MANY, {}, "float32", True),
    (MANY - 1, {}, "float32", False),
    (MANY, {"max_steps": 30}, "float32", False),
    (MANY, {"options": {"opening": False}}, "float32", False),
    (MANY, {}, "float16", False),
])  # fmt: skip
def test_the_strategy_takes_plain_steps_with_enough_unknowns_and_no_budget(steps, n, options, dtype, opened):
    pytest.importorskip("torch")
    be = deqcore.get_backend(backend="torch")
    g = be.asarray(np.random.default_rng(0).standard_normal((2, n)), dtype=dtype)
    _, report = ExactIFT(**options).solve_adjoint(be, lambda u: 0.5 * be.xp.roll(u, 1, axis=1), g, None)
    assert (be.to_numpy(report.status) == Status.CONVERGED).all()
    assert bool(steps) is opened


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["float64", "complex128"])
def test_derivatives_in_torch_are_those_of_the_closed_form(steps, kind, order):
    """z* = (I − a R)^-1 x for a rotation R of the entries, whose eigenvectors are those of the Fourier transform."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    n = MANY if kind == "float64" else MANY // 2
    x, g = rng.standard_normal((2, 2, n)).astype(kind)
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    solution = deqcore.fixed_point(
        lambda z, x, a: a * torch.roll(z, 1, 1) + x,
        torch.zeros(2, n, dtype=getattr(torch, kind)), torch.from_numpy(x), a,
        forward__rtol=1e-10, backward__options={"rtol": 1e-9},
    )  # fmt: skip
    (derivative,) = torch.autograd.grad((solution.value * torch.from_numpy(g)).real.sum(), a, create_graph=True)
    if order == 2:
        (derivative,) = torch.autograd.grad(derivative, a)
    root = np.exp(-2j * np.pi * np.arange(n) / n)
    factor = root / (1 - 0.5 * root) ** 2 if order == 1 else 2 * root**2 / (1 - 0.5 * root) ** 3
    expected = np.sum(np.fft.ifft(np.fft.fft(x) * factor).real * g.real)
    assert float(derivative.detach()) == pytest.approx(expected, rel=1e-7)
    assert steps
