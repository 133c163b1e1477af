"""PyTorch's functions inside f, against implicit differentiation with finite differences and dense algebra.

f(z, x) = c op(z/2 + x) for many op, on a state of two samples. The truth needs values of f only.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

import deqcore

torch = pytest.importorskip("torch")
F = torch.nn.functional

SHAPE = (2, 3, 4)
SIZE = 24
EXACT = {"backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-11, "max_steps": 60}}
STEPS, DAMPING = 3, 0.7
ONCE = {  # PyTorch has no second derivative of these, and says so
    "attention",
    "causal attention",
    "masked attention",
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "hardsigmoid",
    "cdist",
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def fixed(*shape, seed=0, scale=0.5):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


W = fixed(4, 4)


class Cube(torch.autograd.Function):
    """A custom rule that can be differentiated again."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h**3 / 3

    @staticmethod
    def backward(ctx, g):
        (h,) = ctx.saved_tensors
        return g * h**2


def in_place(h):
    y = h * 1.0
    y.mul_(0.5).sin_()
    y[:, 0] += 0.3 * y[:, 1]
    return y


def masked(h):
    y = h.clone()
    y.masked_fill_(torch.eye(3, 4, dtype=torch.bool), 0.1)
    return y


def scattered(h):
    return torch.zeros_like(h).scatter_add(2, torch.tensor([1, 0, 3, 1]).expand(SHAPE), h)


def attention(h, **kwargs):
    q, k, v = (h @ fixed(4, 4, seed=s) for s in (1, 2, 3))
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], **kwargs)[:, 0]


def math_attention(h):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return attention(h)


@functools.cache
def made(kind, *args, **kwargs):
    torch.manual_seed(0)
    return kind(*args, dtype=torch.float64, **kwargs).eval()


def gru(h):
    flat = h.reshape(6, 4)
    return made(torch.nn.GRUCell, 4, 4)(flat, 0.5 * flat).reshape(SHAPE)


def multihead(h):
    return made(torch.nn.MultiheadAttention, 4, 2, batch_first=True)(h, h, h, need_weights=False)[0]


def encoder(h):
    return 0.3 * made(torch.nn.TransformerEncoderLayer, 4, 2, 8, dropout=0.0, batch_first=True).train()(h)


def solve(h):
    a = 3 * torch.eye(3, dtype=h.dtype) + 0.3 * torch.tanh(h[:, :, :3])
    return torch.linalg.solve(a, h)


def cholesky(h):
    a = torch.eye(3, dtype=h.dtype) + h @ h.mT
    return torch.linalg.cholesky(a) @ h * 0.2


def checkpointed(h):
    return torch.utils.checkpoint.checkpoint(lambda h: torch.sin(h @ W), h, use_reentrant=False)


def nested_grad(h):
    return torch.func.vmap(torch.func.grad(lambda row: torch.cos(row @ W).sum()))(h.reshape(6, 4)).reshape(SHAPE)


def sparse(layout):
    @functools.cache
    def matrix():
        dense = fixed(3, 3, seed=5) * (fixed(3, 3, seed=6) > 0)
        return dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()

    return lambda h: torch.stack([matrix() @ each for each in h])


def straight_through(h):
    return h + (torch.tanh(h) - h).detach() * 0.0 + torch.tanh(h) * 0.2


ACTIVATIONS = [
    *("relu", "gelu", "silu", "mish", "softplus", "elu", "selu", "celu", "hardtanh", "hardswish", "leaky_relu"),
    *("logsigmoid", "tanhshrink", "softsign", "relu6", "softshrink", "hardshrink", "hardsigmoid"),
]
OPS = {
    **{name: getattr(F, name) for name in ACTIVATIONS},
    **{name: getattr(torch, name) for name in ("sin", "tanh", "sigmoid", "erf", "atan", "asinh", "sinc")},
    "exp": lambda h: torch.exp(-h * h),
    "expm1": lambda h: torch.expm1(0.3 * torch.sin(h)),
    "softmax": lambda h: F.softmax(h, -1),
    "log_softmax": lambda h: 0.3 * F.log_softmax(h, -1),
    "glu": lambda h: F.glu(torch.cat([h, h.flip(2)], 2), 2),
    "prelu": lambda h: F.prelu(h, torch.tensor([0.1, 0.2, 0.3], dtype=h.dtype)),
    "logaddexp": lambda h: torch.logaddexp(h, torch.zeros((), dtype=h.dtype)),
    "logsumexp": lambda h: h - torch.logsumexp(h, 2, keepdim=True),
    "layer_norm": lambda h: 0.3 * F.layer_norm(h, (4,), eps=1.0),
    "rms_norm": lambda h: 0.3 * F.rms_norm(h, (4,), eps=1.0),
    "group_norm": lambda h: 0.3 * F.group_norm(h, 3, eps=1.0),
    "instance_norm": lambda h: 0.3 * F.instance_norm(h, eps=1.0),
    "batch_norm": lambda h: F.batch_norm(h, torch.zeros(3, dtype=h.dtype), torch.ones(3, dtype=h.dtype)),
    "local_response_norm": lambda h: F.local_response_norm(h, 2),
    "normalize": lambda h: 0.3 * F.normalize(h + 2, dim=2),
    "attention": attention,
    "causal attention": lambda h: attention(h, is_causal=True),
    "masked attention": lambda h: attention(h, attn_mask=torch.tril(torch.ones(3, 3, dtype=torch.bool))),
    "attention by the plain kernel": math_attention,
    "MultiheadAttention": multihead,
    "TransformerEncoderLayer": encoder,
    "GRUCell": gru,
    "einsum": lambda h: torch.einsum("bij,jk,bik->bij", h, W, torch.tanh(h)),
    "matmul": lambda h: h @ W,
    "bilinear": lambda h: F.bilinear(h, h, fixed(4, 4, 4)) * 0.3,
    "conv1d": lambda h: F.conv1d(h, fixed(3, 3, 3), padding=1),
    "conv2d": lambda h: F.conv2d(h[:, None], fixed(1, 1, 3, 3), padding=1)[:, 0],
    "conv_transpose1d": lambda h: F.conv_transpose1d(h, fixed(3, 3, 3), padding=1),
    "unfold": lambda h: F.unfold(h[:, None], (3, 1)).reshape(SHAPE),
    "avg_pool1d": lambda h: F.avg_pool1d(h, 3, 1, 1),
    "max_pool1d": lambda h: F.max_pool1d(h, 3, 1, 1),
    "interpolate": lambda h: F.interpolate(h, 8, mode="linear")[:, :, ::2],
    "rfft": lambda h: torch.fft.irfft(torch.fft.rfft(h) * torch.tensor([0.5, 1j, 0.2]), n=4),
    "fft": lambda h: 0.3 * torch.fft.fft2(h).abs().pow(2).add(1).sqrt(),
    "complex": lambda h: (torch.exp(1j * h) * (1 + 0.5j)).real,
    "cumsum": lambda h: 0.3 * h.cumsum(2),
    "cumprod": lambda h: 0.3 * (1 + 0.3 * h).cumprod(2),
    "sort": lambda h: h.sort(2).values,
    "amax": lambda h: h - 0.5 * h.amax(2, keepdim=True),
    "roll, pad, flip": lambda h: F.pad(h.roll(1, 2).flip(1), (1, 0))[:, :, :4],
    "gather": lambda h: h.gather(2, torch.tensor([3, 3, 0, 1]).expand(SHAPE)),
    "index_select": lambda h: h.index_select(1, torch.tensor([2, 0, 0])),
    "scatter_add": scattered,
    "where": lambda h: torch.where(h > 0.1, torch.sin(h), 0.2 * h),
    "cdist": lambda h: 0.3 * torch.cdist(h, h + 1.0) @ fixed(3, 4),
    "cosine_similarity": lambda h: h * F.cosine_similarity(h, h.flip(2) + 2, 2)[..., None],
    "linalg.solve": solve,
    "cholesky": cholesky,
    "matrix_exp": lambda h: 0.2 * torch.matrix_exp(torch.tanh(h[:, :, :3])) @ torch.tanh(h),
    "inv": lambda h: torch.linalg.inv(3 * torch.eye(3, dtype=h.dtype) + 0.2 * h[:, :, :3]) @ h,
    "sparse coo": sparse("coo"),
    "sparse csr": sparse("csr"),
    "custom Function": lambda h: Cube.apply(torch.tanh(h)),
    "straight-through": straight_through,
    "in place on temporaries": in_place,
    "masked_fill_": masked,
    "checkpoint": checkpointed,
    "grad and vmap": nested_grad,
}


def cell(name, c=0.5):
    return lambda z, x: c * OPS[name](z.reshape(SHAPE) / 2 + x).reshape(2, 12)


@functools.cache
def problem(name):
    """x, z*, g, J = ∂f/∂z and K = ∂f/∂x `(24, 24)` by central differences."""
    f, x, g = cell(name), fixed(*SHAPE, seed=11, scale=0.6), fixed(2, 12, seed=12, scale=1.0)
    with torch.no_grad():
        z = torch.zeros(2, 12, dtype=torch.float64)
        for _ in range(200):
            z = f(z, x)
        assert (f(z, x) - z).norm() < 1e-12
        jacobian = columns(lambda v: f(z + v.reshape(2, 12), x))
        inputs = columns(lambda v: f(z, x + v.reshape(SHAPE)))
    return x, g, jacobian, inputs


def columns(f, h=1e-6):
    eye = torch.eye(SIZE, dtype=torch.float64)
    return torch.stack([(f(h * e) - f(-h * e)).reshape(-1) / (2 * h) for e in eye], 1).numpy()


def gradient(name, x, create_graph=False, **settings):
    x = x if x.requires_grad else x.detach().requires_grad_()
    settings = {"forward__rtol": 1e-13, "forward__on_failure": "ignore", **settings}
    value = deqcore.fixed_point(cell(name), torch.zeros(2, 12, dtype=x.dtype), x, **settings).value
    g = problem(name)[1]
    (found,) = torch.autograd.grad(value, x, g, create_graph=create_graph)
    return found


def applied(strategy, jacobian, g):
    """u of each strategy by dense algebra."""
    eye = np.eye(SIZE)
    if strategy == "jacobian-free":
        return g
    if strategy == "phantom":
        step = np.eye(SIZE) - DAMPING * (eye - jacobian.T)
        return sum(DAMPING * np.linalg.matrix_power(step, k) @ g for k in range(STEPS))
    return np.linalg.solve(eye - jacobian.T, g)


SETTINGS = {
    "exact-ift": EXACT,
    "broyden-reuse": {
        "backward__strategy": "broyden-reuse",
        "backward__options": {"max_relative_error": 1e-7, "max_refine_vjps": 60, "fallback": "none"},
    },
    "jacobian-free": {"backward__strategy": "jacobian-free"},
    "phantom": {"backward__strategy": "phantom", "backward__options": {"steps": STEPS, "damping": DAMPING}},
    "unrolled": {
        "backward__strategy": "unrolled",
        "backward__options": {"steps": 60},
        "forward__solver": "picard",
    },
}


@pytest.mark.parametrize("name", OPS)
def test_first_gradients_of_every_strategy(name):
    x, g, jacobian, inputs = problem(name)
    for strategy, settings in SETTINGS.items():
        truth = inputs.T @ applied(strategy, jacobian, g.reshape(-1).numpy())
        found = gradient(name, x, **settings).detach().reshape(-1).numpy()
        error = np.linalg.norm(found - truth) / np.linalg.norm(truth)
        assert error < 2e-6, f"{strategy} inside f: {error:.2g}"


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives(name):
    """H v against differences of first gradients, or an error of PyTorch's where a kernel has no second derivative."""
    x, v, h = problem(name)[0], fixed(*SHAPE, seed=13, scale=1.0), 1e-5
    truth = (gradient(name, x + h * v, **EXACT) - gradient(name, x - h * v, **EXACT)) / (2 * h)
    leaf = x.clone().requires_grad_()
    if name in ONCE:
        with pytest.raises((RuntimeError, NotImplementedError), match="not implemented"):
            torch.autograd.grad(gradient(name, leaf, create_graph=True, **EXACT), leaf, v)
        return
    first = gradient(name, leaf, create_graph=True, **EXACT)
    if not first.requires_grad:  # piecewise linear
        assert truth.norm() < 1e-6
        return
    (found,) = torch.autograd.grad(first, leaf, v, materialize_grads=True)
    assert (found - truth).norm() < 1e-5 * truth.norm() + 1e-6
