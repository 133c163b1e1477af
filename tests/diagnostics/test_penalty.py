"""Jacobian-norm regularisation against dense Jacobians, and its gradients against closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import deqcore
from deqcore.diagnostics import jacobian_penalty
from deqcore.errors import InitialIterateError

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")


@pytest.fixture
def be(every):
    return every


def signs(n, rows):
    """All sign vectors: their mean of ‖Jᵀε‖² is ‖J‖_F² exactly."""
    return [np.tile(each, (rows, 1)) for each in itertools.product([-1.0, 1.0], repeat=n)]


def test_all_signs_give_the_frobenius_norm(be):
    rng = np.random.default_rng(0)
    w, z = rng.standard_normal((4, 4)), rng.standard_normal((3, 4))
    stored = be.asarray(w)
    found = jacobian_penalty(
        lambda z: be.xp.tanh(be.xp.matmul(z, stored.T)),
        be.asarray(z),
        noise=[be.asarray(each) for each in signs(4, 3)],
    )
    jacobian = (1 - np.tanh(z @ w.T) ** 2)[:, :, None] * w
    assert be.to_numpy(found) == pytest.approx(np.sum(jacobian**2, axis=(1, 2)), rel=1e-9)


def test_normal_noise_is_right_on_average():
    rng = np.random.default_rng(1)
    a, rows = rng.standard_normal((20, 20)), 4000
    found = jacobian_penalty(lambda z: z @ a.T, np.zeros((rows, 20)), noise=rng.standard_normal((rows, 20)))
    spread = np.sqrt(2 * np.sum((a @ a.T) ** 2) / rows)  # variance of εᵀ(A Aᵀ)ε for normal ε
    assert abs(found.mean() - np.sum(a**2)) < 4 * spread


def test_torch_differentiates_it_for_parameters_and_state():
    torch.manual_seed(0)
    w = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 5, dtype=torch.float64)

    def loss(w, z):
        return jacobian_penalty(lambda z, w: torch.tanh(z @ w.T), z, w, noise=noise).sum()

    assert torch.autograd.gradcheck(loss, (w, z))


def test_torch_differentiates_it_for_a_module_with_a_detached_state():
    torch.manual_seed(1)
    cell = torch.nn.Linear(4, 4, bias=False)
    noise = [torch.tensor(each, dtype=torch.float32) for each in signs(4, 2)]
    penalty = jacobian_penalty(cell, torch.zeros(2, 4), noise=noise)
    assert penalty.dtype == torch.float32
    penalty.mean().backward()
    assert torch.allclose(cell.weight.grad, 2 * cell.weight)  # d‖W‖_F² / dW


def test_torch_through_the_fixed_point():
    """With the attached z* the gradient is that of w ↦ J(z*(w), w)²; one number, so J = w (1 − z*²)."""
    w = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[0.4]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)

    def f(z, w):
        return torch.tanh(w * z + x)

    def value(w):
        settings = {"forward__rtol": 1e-13, "backward__strategy": "exact-ift"}
        z = deqcore.fixed_point(f, torch.zeros(1, 1, dtype=torch.float64), w, **settings).value
        return jacobian_penalty(f, z, w, noise=one).sum()

    value(w).backward()
    h = 1e-5
    with torch.no_grad():
        expected = (value(w + h) - value(w - h)) / (2 * h)
    assert w.grad.item() == pytest.approx(expected.item(), rel=1e-6)


def test_torch_without_recording_gives_the_value():
    with torch.no_grad():
        found = jacobian_penalty(lambda z: 3 * z, torch.zeros(2, 2), noise=torch.ones(2, 2))
    assert found.tolist() == [18.0, 18.0]
    assert not found.requires_grad


def test_an_f_that_ignores_its_state_has_no_norm(be):
    x = be.asarray(np.ones((2, 3)))
    found = jacobian_penalty(lambda z, x: x + 0 * x, be.asarray(np.zeros((2, 3))), x, noise=x)
    assert be.to_numpy(found).tolist() == [0.0, 0.0]


def test_jax_differentiates_it_compiled():
    with jax.enable_x64(True):
        rng = np.random.default_rng(2)
        w, z, noise = (jax.numpy.asarray(rng.standard_normal(s)) for s in ((4, 4), (2, 4), (2, 4)))

        def loss(w):
            return jacobian_penalty(lambda z, w: z @ w.T, z, w, noise=noise).sum()

        found = jax.jit(jax.grad(loss))(w)
        assert np.asarray(found) == pytest.approx(np.asarray(2 * noise.T @ noise @ w), rel=1e-9)


def test_device_and_dtype_are_the_states():
    half = torch.zeros(2, 3, dtype=torch.bfloat16)
    found = jacobian_penalty(lambda z: 0.5 * z, half, noise=torch.ones_like(half))
    assert found.dtype == torch.bfloat16
    meta = torch.zeros(2, 3, device="meta")
    assert jacobian_penalty(lambda z: 0.5 * z, meta, noise=torch.ones_like(meta)).device.type == "meta"


def test_trees_empty_batches_and_nan(be):
    z = {"a": be.asarray(np.zeros((2, 1))), "b": be.asarray(np.zeros((2, 2)))}
    noise = {"a": be.asarray(np.ones((2, 1))), "b": be.asarray(np.ones((2, 2)))}
    assert be.to_numpy(jacobian_penalty(lambda z: {"a": 2 * z["a"], "b": z["b"]}, z, noise=noise)).tolist() == [
        6.0,
        6.0,
    ]
    empty = be.asarray(np.zeros((0, 2)))
    assert be.to_numpy(jacobian_penalty(lambda z: 2 * z, empty, noise=empty)).shape == (0,)
    broken = be.asarray(np.array([[np.nan, 1.0], [2.0, 3.0]]))
    found = be.to_numpy(jacobian_penalty(lambda z: z * z, broken, noise=be.asarray(np.ones((2, 2)))))
    assert np.isnan(found[0])
    assert found[1] == pytest.approx(4 * (4 + 9))


def test_noise_must_be_like_the_state():
    with pytest.raises(InitialIterateError, match="noise"):
        jacobian_penalty(lambda z: z, np.zeros((1, 2)), noise=np.zeros((1, 3)))
    with pytest.raises(InitialIterateError, match="noise"):
        jacobian_penalty(lambda z: z, np.zeros((1, 2), np.float32), noise=np.zeros((1, 2)))
    with pytest.raises(InitialIterateError, match="at least one probe"):
        jacobian_penalty(lambda z: z, np.zeros((1, 2)), noise=[])
