"""Krylov spaces that the host's native steps grow, and the witness, against NumPy and dense algebra."""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from deqcore_torch.kernels import TorchKernels  # noqa: E402
from deqcore_torch.native.linear import Secants  # noqa: E402

import deqcore  # noqa: E402
from deqcore.abc.kernels import FusedKernels  # noqa: E402
from deqcore.backward.to_error import solve_to_error  # noqa: E402
from deqcore.linear.gmres import KrylovSpace, gmres  # noqa: E402
from deqcore.linear.norms import orthogonalize  # noqa: E402
from deqcore.linear.rules import WITNESSED  # noqa: E402
from deqcore.solve.loop import iterate  # noqa: E402
from deqcore.solvers.broyden import Broyden  # noqa: E402
from deqcore.solvers.picard import Picard  # noqa: E402
from deqcore.types import StoppingCriteria  # noqa: E402

TORCH, NUMPY = deqcore.get_backend(backend="torch"), deqcore.get_backend(backend="numpy")


def systems(batch: int, n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return 0.8 * rng.standard_normal((batch, n, n)) / np.sqrt(n), rng.standard_normal((batch, n))


def space_of(backend, matrix, **options):
    j = backend.asarray(matrix)
    return KrylovSpace(backend, lambda v: backend.xp.matmul(v[:, None, :], j)[:, 0, :], **options)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_space_that_grows_is_that_of_the_core(shifted, together, reorthogonalize):
    matrix, g = systems(6, 24)
    g[2] = 0.0
    ends = []
    for backend in (TORCH, NUMPY):
        space = space_of(backend, matrix, shifted=shifted, reorthogonalize=reorthogonalize)
        k = space.begin(backend.asarray(g), 20)
        goals = np.array([1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
        before = [float(each) for each in k.residual]
        once = space.grow(k, backend.asarray(goals), 6, together=together)
        assert [float(each) for each in k.residual] == before, "the space that grew is still what it was"
        k = space.grow(once, backend.asarray(1e-3 * goals), 12, together=together)
        ends.append(
            [
                np.asarray(each.numpy() if hasattr(each, "numpy") else each)
                for each in (k.residual, k.steps, k.can_grow, k.dimension, space.solution(k))
            ]
        )
    for ours, own in zip(*ends, strict=True):
        np.testing.assert_allclose(ours, own, rtol=1e-6, atol=1e-10)


def test_solutions_are_those_of_dense_systems():
    matrix, g = systems(5, 16, seed=1)
    space = space_of(TORCH, matrix, shifted=True)
    k = space.grow(space.begin(torch.from_numpy(g), 16), torch.full((5,), 1e-12, dtype=torch.float64), 16)
    dense = np.linalg.solve(np.eye(16) - matrix.transpose(0, 2, 1), g[:, :, None])[:, :, 0]
    np.testing.assert_allclose(space.solution(k), dense, rtol=1e-8, atol=1e-9)
    assert (k.residual <= 1e-9).all()


def test_norms_of_the_inverse_are_found_where_they_are_asked():
    matrix, g = systems(4, 20, seed=2)
    space = space_of(TORCH, matrix, shifted=True)
    k = space.grow(space.begin(torch.from_numpy(g), 8), torch.zeros(4, dtype=torch.float64), 6)
    rows = torch.tensor([True, False, True, False])
    found = space.least_squares(k, inverse=rows).inverse_norm
    columns = k.columns.vectors()[:, :, :7].transpose(1, 2)
    least = np.linalg.svd(columns.numpy(), compute_uv=False)[:, -1]
    np.testing.assert_allclose(found[rows], 1.0 / least[rows], rtol=2e-3)
    assert (found[~rows] == 1.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 5, 9])
def test_the_witness_of_a_space_is_that_of_its_residual(monkeypatch, dtype, batch):
    """With a rule that the witness alone decides, every reported error is 7 ‖M' r‖ / ‖u‖, here by the dense formula."""
    rule = WITNESSED._replace(spread=0.0, mean=0.0, witness=7.0)
    monkeypatch.setattr("deqcore.linear.certified.WITNESSED", rule)
    matrix, g = systems(batch, 30, seed=3)
    j, x = torch.from_numpy(matrix).to(dtype), torch.from_numpy(g).to(dtype)
    solver = Broyden(history_size=40)
    f = lambda z: torch.tanh(torch.einsum("bij,bj->bi", j, z) + x)
    state = iterate(TORCH, solver, f, torch.zeros_like(x), StoppingCriteria(rtol=1e-5, max_steps=25)).carry.state
    estimate = solver.secant_estimate(TORCH, state)
    assert type(estimate) is Secants
    product = lambda v: torch.matmul(v[:, None, :], j)[:, 0, :]
    for target in (0.3, 0.1, 0.03):
        found = solve_to_error(TORCH, product, x, estimate, "witness", max_relative_error=target, max_vjps=25)
        r = x + product(found.u) - found.u
        dense = solver._secants(TORCH, state).apply_transpose_unregularised(r).double().norm(dim=1)
        expected = 7.0 * dense / found.u.double().norm(dim=1)
        np.testing.assert_allclose(found.error, expected, rtol=3e-3 if dtype is torch.float32 else 1e-6)


def test_the_witness_knows_histories_that_have_begun_again():
    """Samples with more slow modes fill their history sooner, so that each has begun again at another step."""
    rng = np.random.default_rng(0)
    vectors, modes = np.linalg.qr(rng.standard_normal((7, 40, 40)))[0], rng.uniform(-0.6, 0.6, (7, 40))
    for i in range(7):
        modes[i, :i] = rng.uniform(0.85, 0.97, i)
    j = torch.from_numpy(vectors * modes[:, None] @ vectors.transpose(0, 2, 1))
    v = torch.from_numpy(rng.standard_normal((7, 40)))
    f = lambda z: torch.einsum("bij,bj->bi", j, z) + v
    for size in (5, 9, 14):
        solver, stop = Broyden(history_size=size), StoppingCriteria(rtol=1e-5, max_steps=33)
        state = iterate(TORCH, solver, f, torch.zeros_like(v), stop).carry.state
        assert state.basis.written > size + 1
        assert len(set(state.basis.seen.sum(1).tolist())) > 2
        estimate = solver.secant_estimate(TORCH, state)
        assert type(estimate) is Secants
        dense = solver._secants(TORCH, state).apply_transpose_unregularised(v)
        np.testing.assert_allclose(estimate.apply_transpose_unregularised(v), dense, rtol=1e-9, atol=1e-9)


def test_a_product_that_autograd_records_is_left_to_the_core():
    matrix, g = systems(3, 12, seed=4)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    j = torch.from_numpy(matrix)
    space = KrylovSpace(TORCH, lambda v: scale * torch.matmul(v[:, None, :], j)[:, 0, :], shifted=True)
    k = space.grow(space.begin(torch.from_numpy(g), 12), torch.full((3,), 1e-9, dtype=torch.float64), 12)
    dense = np.linalg.solve(np.eye(12) - matrix.transpose(0, 2, 1), g[:, :, None])[:, :, 0]
    np.testing.assert_allclose(space.solution(k).detach(), dense, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_neighbour_changes_nothing(poison):
    matrix, g = systems(4, 15, seed=5)
    space = space_of(TORCH, matrix, shifted=True)
    ends = []
    for bad in (g[1], np.full(15, poison)):
        g[1] = bad
        k = space.grow(space.begin(torch.from_numpy(g.copy()), 15), torch.full((4,), 1e-6, dtype=torch.float64), 15)
        ends.append(space.solution(k)[[0, 2, 3]])
    assert torch.equal(*ends)


@pytest.mark.parametrize("witness", [True, False])
def test_decisions_are_the_same_where_figures_stay_the_backends(monkeypatch, witness):
    matrix, g = systems(7, 40, seed=6)
    j, x = torch.from_numpy(matrix), torch.from_numpy(g)
    f = lambda z: torch.tanh(torch.einsum("bij,bj->bi", j, z) + x)
    solver = Broyden(history_size=40)
    state = iterate(TORCH, solver, f, torch.zeros_like(x), StoppingCriteria(rtol=1e-5, max_steps=30)).carry.state
    estimate = solver.secant_estimate(TORCH, state)

    def solved():
        return solve_to_error(
            TORCH,
            lambda v: torch.matmul(v[:, None, :], j)[:, 0, :],
            x,
            estimate,
            "witness" if witness else "none",
            max_relative_error=0.03,
            max_vjps=40,
        )

    ours = solved()
    monkeypatch.setattr(type(TORCH.host), "numpy_view", lambda self, x: None)
    own = solved()
    assert ours.met.all()
    assert ours.vjps.tolist() == own.vjps.tolist()
    for field in ("u", "residual", "error"):
        np.testing.assert_allclose(getattr(ours, field), getattr(own, field), rtol=3e-3, atol=1e-9)
    dense = np.linalg.solve(np.eye(40) - matrix.transpose(0, 2, 1), g[:, :, None])[:, :, 0]
    error = np.linalg.norm(ours.u.numpy() - dense, axis=1) / np.linalg.norm(dense, axis=1)
    assert (error <= 0.03).all()
    assert ours.vjps.max() < 40


def test_every_kernel_that_the_host_has_is_taken():
    """A path that leaves one out gives the same numbers at another cost."""
    taken = set()

    def spied(name):
        own = getattr(TorchKernels, name)

        def kernel(self, *args, **options):
            result = own(self, *args, **options)
            taken.update([name] if result is not None else [])
            return result

        return mock.patch.object(TorchKernels, name, kernel)

    matrix, g = systems(4, 20, seed=3)
    j, g = torch.as_tensor(matrix), torch.as_tensor(g)
    names = [name for name in vars(FusedKernels) if not name.startswith("_")]
    f, stop = lambda z: torch.matmul(z[:, None, :], j)[:, 0, :] + g, StoppingCriteria(rtol=1e-2, atol=0.0, max_steps=9)
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(spied(name))
        for solver, expected in (
            (Picard(), {"residual_norms"}),
            (Broyden(), {"step"}),
        ):
            taken.clear()
            end = iterate(TORCH, solver, f, g, stop)
            assert expected <= taken, f"{solver}: {taken}"
        taken.clear()
        estimate = Broyden().secant_estimate(TORCH, end.carry.state)
        solve_to_error(TORCH, lambda u: torch.matmul(u[:, None, :], j)[:, 0, :], g, estimate, "witness",
                       max_relative_error=0.01, max_vjps=20)  # fmt: skip
        assert {"secants", "certify"} <= taken, taken
        for every in ("auto", 1):
            taken.clear()
            gmres(TORCH, lambda u: torch.matmul(u[:, None, :], j)[:, 0, :], g, rtol=1e-3, max_steps=9,
                  check_every=every, shifted=True)  # fmt: skip
            assert "least_squares" in taken
            assert ("grow" in taken) == (every == "auto")
        taken.clear()
        space = space_of(TORCH, matrix)
        orthogonalize(TORCH, space.begin(g, 4).basis, g, True)
        assert taken == {"orthogonalize"}
