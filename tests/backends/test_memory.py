"""What f keeps is f's, what the user passed is the user's: neither is written to, nor returned as the value."""

import contextlib

import numpy as np
import pytest

import deqcore

torch = pytest.importorskip("torch")

SOLVERS = ["picard", "anderson", "broyden", "newton-krylov"]
W = np.array([[0.3, -0.2, 0.1], [0.2, 0.4, -0.3], [0.0, 0.1, 0.2]])
B = np.array([[1.0, -2.0, 0.5], [0.3, 0.1, -0.7]])
ROOT = np.linalg.solve(np.eye(3) - W.T, B.T).T


def shares(a, b):
    if isinstance(a, np.ndarray):
        return np.shares_memory(a, b)
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def host(x):
    return np.array(x if isinstance(x, np.ndarray) else x.numpy())


@pytest.fixture(params=["numpy", "torch", "inference"])
def kind(request):
    """How arrays are made, and in what mode."""
    quiet = {"numpy": contextlib.nullcontext, "torch": torch.no_grad, "inference": torch.inference_mode}[request.param]
    with quiet():
        yield np.array if request.param == "numpy" else torch.tensor


@pytest.mark.parametrize("view", [False, True], ids=["itself", "a view"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_buffer_that_f_reuses(kind, solver, view):
    w, b = kind(W), kind(B)
    if isinstance(w, torch.Tensor) and (solver == "newton-krylov" or w.is_inference()):
        pytest.skip("torch writes no out= under differentiation, and none of inference mode outside of it")
    buffer = kind(np.empty((2, 3)))

    def f(z):
        (np.matmul if isinstance(z, np.ndarray) else torch.matmul)(z, w, out=buffer)
        buffer[...] += b
        return buffer.reshape(2, 3)[:] if view else buffer

    sol = deqcore.fixed_point(f, kind(0 * B), forward__solver=solver, forward__rtol=1e-10)
    assert host(sol.value) == pytest.approx(ROOT, rel=1e-8)
    assert sol.converged.all()
    before = host(sol.value)
    buffer[...] = 7.0
    assert np.array_equal(host(sol.value), before)
    assert not shares(sol.value, buffer)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("closed", [False, True])
def test_f_that_returns_what_it_was_given(kind, solver, closed):
    x = kind(B)
    if closed:
        sol = deqcore.fixed_point(lambda z: x, kind(0 * B), forward__solver=solver)
    else:
        sol = deqcore.fixed_point(lambda z, x: x, kind(0 * B), x, forward__solver=solver)
    assert not shares(sol.value, x)
    value = sol.value
    if isinstance(value, np.ndarray) or not value.is_inference():
        value[...] = 0.0
    assert np.array_equal(host(x), B)


@pytest.mark.parametrize("strategy", ["exact-ift", "phantom", "unrolled"])
def test_a_start_that_is_the_solution(kind, strategy):
    z0 = kind(ROOT)
    w, b = kind(W), kind(B)
    for f in (lambda z: z @ w + b, lambda z: z):
        sol = deqcore.fixed_point(f, z0, forward__solver="picard", backward__strategy=strategy)
        assert not shares(sol.value, z0)


def test_writing_to_z_is_still_named():
    for z0 in (np.zeros((1, 2)), torch.zeros(1, 2)):

        def f(z):
            z += 1.0
            return 0.5 * z

        with pytest.raises(deqcore.errors.ProblemError, match="in place"):
            deqcore.fixed_point(f, z0)


def test_a_fresh_result_is_not_copied():
    """Of modules, views, parts, and inside a list, in every mode."""
    from deqcore_numpy.ownership import held as held_numpy
    from deqcore_torch.ownership import held

    def returned(f, z):
        found = f(z)
        leaves = [found[0] if isinstance(found, list) else found]
        del f
        return leaves, found

    linear, w = torch.nn.Linear(3, 3), torch.ones(3, 3)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            z = torch.zeros(2, 3)
            for f in (linear, lambda z: z @ w, lambda z: (z @ w).reshape(2, 3), lambda z: (z @ w).split(1)[0]):
                leaves, found = returned(f, z)
                assert not held(leaves)
                assert found is leaves[0]
    for g in (lambda z: z @ W, lambda z: (z @ W).reshape(2, 3)):
        leaves, found = returned(g, B)
        assert not held_numpy(leaves)
    leaves, found = returned(lambda z: B, B)
    assert held_numpy(leaves)


def test_gradients_reach_what_f_returns_as_it_is():
    x = torch.ones(1, 2, requires_grad=True)
    sol = deqcore.fixed_point(lambda z: x, torch.zeros(1, 2))
    (dx,) = torch.autograd.grad(sol.value.sum(), x)
    assert torch.allclose(dx, torch.ones(1, 2))
