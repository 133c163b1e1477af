"""What each backend promises of a batch: samples are independent, however many there are and however ill one is."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.solvers.broyden import Broyden
from deqcore.types import Status

BACKENDS = ["numpy", "torch", "jax"]


@pytest.fixture
def be(every):
    return every


def draw(batch, n, dtype, seed=0):
    random = np.random.default_rng(seed)
    w = 0.9 * random.standard_normal((batch, n, n)) / n**0.5 * np.linspace(0.3, 1.0, batch)[:, None, None]
    return w.astype(dtype), random.standard_normal((batch, n)).astype(dtype)


def cell(be):
    """Each sample has weights of its own; products are sums of rows, so that f itself cannot mix them."""

    def f(z, w, x):
        return be.xp.tanh(be.xp.sum(w * z[:, None, :], axis=2) + x)

    return f


def solve(be, w, x, **overrides):
    """z*, and H v and Hᵀ v of the estimate that Broyden left behind."""
    w, x = be.asarray(w), be.asarray(x)
    settings = {"forward__solver": "broyden", "forward__rtol": 1e-3, "forward__on_failure": "ignore", **overrides}
    sol = deqcore.fixed_point(cell(be), 0 * x, w, x, **settings)
    h = Broyden().inverse_jacobian(be, sol.state.carry.state)
    v = be.asarray(np.random.default_rng(9).standard_normal((1, x.shape[1])).repeat(x.shape[0], 0), like=x)
    found = [be.to_numpy(be.detach(a)) for a in (sol.value, h.apply(v), h.apply_transpose(v))]
    return found, be.to_numpy(sol.status), be.to_numpy(sol.steps)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_a_sample_alone_gives_the_same_solution_and_estimate(be, dtype, tolerance):
    w, x = draw(4, 12, dtype)
    together, _, steps = solve(be, w, x, forward__max_steps=6)
    assert len(set(steps.tolist())) > 1  # they stop at different times
    for i in range(4):
        alone, _, own = solve(be, w[i : i + 1], x[i : i + 1], forward__max_steps=6)
        assert own[0] == steps[i]
        for name, a, b in zip(("z", "H v", "Hᵀ v"), alone, together, strict=True):
            assert np.linalg.norm(a[0] - b[i]) <= tolerance * np.linalg.norm(b[i]), name


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_torch_is_bitwise_the_same_for_an_elementwise_function(dtype, solver):
    torch = pytest.importorskip("torch")
    be = deqcore.get_backend(backend="torch")
    kind = getattr(torch, dtype)
    x = torch.as_tensor(np.random.default_rng(0).standard_normal((64, 512)), dtype=kind)

    def run(x):
        sol = deqcore.fixed_point(
            lambda z, x: 0.5 * torch.sin(z) + x, torch.zeros_like(x), x, forward__solver=solver, forward__rtol=1e-5
        )
        found = [sol.value]
        if solver == "broyden":
            h = Broyden().inverse_jacobian(be, sol.state.carry.state)
            v = torch.ones_like(x)
            found += [h.apply(v), h.apply_transpose(v)]
        return found

    together = run(x)
    for i in (0, 17, 63):
        for a, b in zip(run(x[i : i + 1]), together, strict=True):
            assert torch.equal(a[0], b[i])


@pytest.mark.parametrize("harm", ["nan", "divergent"])
def test_an_ill_sample_changes_no_bit_of_its_neighbours(be, harm):
    """NaN from the inputs, or weights that make it grow; its neighbours keep value, estimate and gradient."""
    w, x = draw(4, 8, "float64")
    xp = be.xp

    def f(z, w, x):
        return xp.sum(w * z[:, None, :], axis=2) + x

    def run(ill):
        moved_w, moved_x = w.copy(), x.copy()
        if ill and harm == "nan":
            moved_x[2] = np.nan
        if ill and harm == "divergent":
            moved_w[2] = 100 * np.eye(8)
        z, (dw, dx) = deqcore.vjp(
            f,
            be.asarray(0 * x),
            be.asarray(moved_w),
            be.asarray(moved_x),
            cotangent=be.asarray(np.ones_like(x)),
            forward__solver="anderson",
            forward__on_failure="ignore",
            forward__max_steps=30,
            backward__strategy="broyden-reuse",
        )
        return [np.delete(be.to_numpy(a), 2, axis=0) for a in (z, dw, dx)]

    for healthy, beside in zip(run(False), run(True), strict=True):
        assert np.isfinite(healthy).all()
        assert np.array_equal(healthy, beside)


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(be, batch):
    w, x = draw(batch, 5, "float64", seed=3) if batch else (np.zeros((0, 5, 5)), np.zeros((0, 5)))
    g = np.ones_like(x)
    z, (dw, dx) = deqcore.vjp(
        cell(be),
        be.asarray(0 * x),
        be.asarray(w),
        be.asarray(x),
        cotangent=be.asarray(g),
        forward__rtol=1e-12,
        backward__strategy="exact-ift",
        backward__options={"rtol": 1e-12},
    )
    z, dw, dx = (be.to_numpy(a) for a in (z, dw, dx))
    assert (z.shape, dw.shape, dx.shape) == (x.shape, w.shape, x.shape)
    if batch:
        slope = 1 - z[0] ** 2
        u = np.linalg.solve(np.eye(5) - (slope[:, None] * w[0]).T, g[0])
        assert np.allclose(np.tanh(w[0] @ z[0] + x[0]), z[0], atol=1e-11)
        assert np.allclose(dx[0], slope * u, atol=1e-8)
        assert np.allclose(dw[0], np.outer(slope * u, z[0]), atol=1e-8)


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_few_steps_are_what_they_say(be, solver, steps):
    w, x = draw(3, 6, "float64")
    z = np.zeros((3, 6))
    iterates = [z]
    for _ in range(3):
        z = np.tanh(np.einsum("bij,bj->bi", w, z) + x)
        iterates.append(z)
    arrays = be.asarray(w), be.asarray(x)
    sol = deqcore.fixed_point(
        cell(be),
        be.asarray(0 * x),
        *arrays,
        forward__solver=solver,
        forward__rtol=1e-14,
        forward__max_steps=steps,
        forward__on_failure="ignore",
    )
    assert be.to_numpy(sol.steps).tolist() == [steps] * 3
    assert be.to_numpy(sol.evaluations).tolist() == [steps + 1] * 3
    assert be.to_numpy(sol.status).tolist() == [int(Status.MAX_STEPS)] * 3
    if steps < 2 or solver == "picard":  # the first step of every method is the plain one
        assert np.allclose(be.to_numpy(be.detach(sol.value)), iterates[steps], atol=1e-14)
    else:
        assert (be.to_numpy(sol.residual) < np.linalg.norm(iterates[1] - iterates[0], axis=1)).all()


REUSE = {
    "plain": {"certify": False, "max_relative_error": None, "fallback": "none"},
    "certified": {"certify": True, "max_relative_error": None, "fallback": "none"},
}


def reuse_gradients(be, rate, x, g, solver, options):
    """The gradient by reuse of a chain whose samples need 4 to some 30 steps; f works by element."""
    _, (_, dx) = deqcore.vjp(
        lambda z, rate, x: rate * be.xp.sin(be.xp.roll(z, 1, axis=1)) + x,
        be.asarray(0 * x),
        be.asarray(rate),
        be.asarray(x),
        cotangent=be.asarray(g),
        forward__solver=solver,
        forward__rtol=1e-4,
        forward__max_steps=38,
        forward__on_failure="ignore",
        backward__strategy="broyden-reuse",
        backward__options=options,
        backward__on_failure="ignore",
        backward__verify_every=0,
    )
    return be.to_numpy(dx)


@pytest.mark.parametrize("n", [10, 64, 130, 513])  # rows that are and are not aligned, narrow and wide
@pytest.mark.parametrize("solver", ["broyden", "anderson"])
@pytest.mark.parametrize("certify", REUSE)
@pytest.mark.parametrize("native", ["0", "1"])
def test_a_reuse_gradient_does_not_depend_on_the_batch_by_a_bit(be, n, solver, certify, native, monkeypatch):
    if native == "0" and be.name != "torch":
        pytest.skip("torch alone has compiled steps")
    if be.name != "torch" and n > 10:
        pytest.skip("by differences, or by a compilation for each batch size")
    if be.name == "torch":
        from deqcore_torch import compiled as steps

        monkeypatch.setenv("DEQCORE_NATIVE", native)
        steps.loaded.cache_clear()
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 64, n)).astype("float32")
    rate = np.full((64, n), np.linspace(0.05, 0.95, 64)[:, None]).astype("float32")
    whole = reuse_gradients(be, rate, x, g, solver, REUSE[certify])
    parts = [[0], [31], [63], [0, 63], [31, 2], [*range(0, 63, 9)], [*rng.permutation(64)]]
    for rows in parts if be.name == "torch" else [parts[2], parts[3], parts[-1]]:
        found = reuse_gradients(be, rate[rows], x[rows], g[rows], solver, REUSE[certify])
        assert np.array_equal(found, whole[rows]), (rows, np.abs(found - whole[rows]).max())
    if be.name == "torch":
        steps.loaded.cache_clear()


@pytest.mark.parametrize("options", [{}, {"max_relative_error": 0.1}, {"max_steps": 3}], ids=str)
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_an_exact_gradient_does_not_depend_on_the_batch_by_a_bit(name, options):
    pytest.importorskip(name)
    be = deqcore.get_backend(backend=name)
    x, g = np.random.default_rng(0).standard_normal((2, 5, 9))
    roll = be.xp.roll

    def gradient(rows):
        settings = {"backward__strategy": "exact-ift", "backward__options": options, "backward__on_failure": "ignore"}
        f = lambda z, x: 0.6 * be.xp.tanh(z + 0.7 * roll(z, 1, axis=1)) - 0.35 * roll(z, 2, axis=1) + x
        start, given = be.asarray(0 * x[rows]), be.asarray(x[rows])
        return be.to_numpy(deqcore.vjp(f, start, given, cotangent=be.asarray(g[rows]), **settings)[1][0])

    whole = gradient([*range(5)])
    for rows in ([0], [2], [1, 3], [4, 0], [2, 2, 2]):
        assert np.array_equal(gradient(rows), whole[rows]), rows


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.filterwarnings("ignore::deqcore.errors.ConvergenceWarning")
@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_no_warning_of_numpy_leaves_a_solve_of_torch(solver):
    """The loop judges torch's tensors on the host through NumPy, where rtol·‖f(z)‖ and residuals may overflow."""
    torch = pytest.importorskip("torch")
    z0, x = torch.zeros(3, 4), torch.full((3, 4), 1e37)
    f = lambda z, x: 2 * z + x
    settings = {"forward__solver": solver, "forward__rtol": 1e30, "forward__atol": 3e38}
    for overrides in ({}, settings):
        sol = deqcore.fixed_point(f, z0, x, **{"forward__solver": solver, **overrides})
        deqcore.fixed_point(lambda z, x: 0.5 * torch.tanh(z) + x, z0, x, state=sol.state, forward__solver=solver)
