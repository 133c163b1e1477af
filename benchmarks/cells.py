"""Cells that need a framework's own operations: a convolutional block and an attention block, for torch and JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from deqcore.bench.cases import CASES, SMALL, Case, narrow
from deqcore.testing.problem import Problem

GROUPS: Final = 8
HEADS: Final = 4


def conv_torch(p: Any, z: Any, x: Any) -> Any:
    """GN(relu(z/2 + x + GN(K₂ ∗ GN(relu(K₁ ∗ z)))/2)): a residual block like MDEQ's."""
    import torch.nn.functional as F

    y = F.group_norm(F.relu(F.conv2d(z, p["K1"], padding=1)), GROUPS)
    y = F.group_norm(F.conv2d(y, p["K2"], padding=1), GROUPS)
    return F.group_norm(F.relu(0.5 * z + x + 0.5 * y), GROUPS)


def conv_jax(p: Any, z: Any, x: Any) -> Any:
    """Return the same."""
    import jax
    import jax.numpy as jnp

    def conv(a: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(a, kernel, (1, 1), "SAME")

    def norm(a: Any) -> Any:
        grouped = a.reshape(a.shape[0], GROUPS, -1)
        mean = grouped.mean(2, keepdims=True)
        variance = jnp.square(grouped - mean).mean(2, keepdims=True)
        return ((grouped - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(a.shape)

    y = norm(jax.nn.relu(conv(z, p["K1"])))
    y = norm(conv(y, p["K2"]))
    return norm(jax.nn.relu(0.5 * z + x + 0.5 * y))


def attention_torch(p: Any, z: Any, x: Any) -> Any:
    """Return a transformer block with injection: a = LN(z/2 + x + attention(z)/2), LN(a + mlp(a)/4)."""
    import torch.nn.functional as F

    batch, tokens, width = z.shape
    parts = (z @ p["Wqkv"]).view(batch, tokens, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(*parts.unbind(0)).transpose(1, 2).reshape(batch, tokens, width)
    a = F.layer_norm(0.5 * z + x + 0.5 * (mixed @ p["Wo"]), (width,))
    return F.layer_norm(a + 0.25 * (F.gelu(a @ p["W1"]) @ p["W2"]), (width,))


def attention_jax(p: Any, z: Any, x: Any) -> Any:
    """Return the same."""
    import jax
    import jax.numpy as jnp

    def norm(a: Any) -> Any:
        mean = a.mean(-1, keepdims=True)
        return (a - mean) * jax.lax.rsqrt(jnp.square(a - mean).mean(-1, keepdims=True) + 1e-5)

    batch, tokens, width = z.shape
    q, k, v = jnp.moveaxis((z @ p["Wqkv"]).reshape(batch, tokens, 3, HEADS, width // HEADS), 2, 0)
    mixed = jax.nn.dot_product_attention(q, k, v).reshape(batch, tokens, width)
    a = norm(0.5 * z + x + 0.5 * (mixed @ p["Wo"]))
    return norm(a + 0.25 * (jax.nn.gelu(a @ p["W1"], approximate=False) @ p["W2"]))


def rated_torch(p: Any, z: Any, x: Any) -> Any:
    """ρ tanh(K ∗ z) + b with a contraction rate ρ per sample; ‖K∗‖ = 1."""
    import torch
    import torch.nn.functional as F

    return x["rate"] * torch.tanh(F.conv2d(z, p["K"], padding=1)) + x["b"]


def conv(batch: int = 32, size: int = 48, side: int = 16) -> Case:
    """Return a residual block of two 3×3 convolutions with group norm."""
    rng = np.random.default_rng(10)
    kernels = {name: (2 / (9 * size)) ** 0.5 * rng.standard_normal((size, size, 3, 3)) for name in ("K1", "K2")}
    x = narrow(1.5 * rng.standard_normal((batch, size, side, side)))
    params = {name: narrow(kernel) for name, kernel in kernels.items()}
    return Case(
        Problem("conv", params, x, 0 * x, {"torch": conv_torch, "jax": conv_jax}),
        f"residual block, two 3×3 convolutions with group norm, {batch}×{size}×{side}×{side}",
    )


def attention(batch: int = 32, size: int = 128, tokens: int = 32) -> Case:
    """Return a transformer block."""
    rng = np.random.default_rng(11)
    shapes = {"Wqkv": (size, 3 * size), "Wo": (size, size), "W1": (size, 4 * size), "W2": (4 * size, size)}
    params = {name: narrow(rng.standard_normal(shape) / shape[0] ** 0.5) for name, shape in shapes.items()}
    x = narrow(1.5 * rng.standard_normal((batch, tokens, size)))
    return Case(
        Problem("attention", params, x, 0 * x, {"torch": attention_torch, "jax": attention_jax}),
        f"transformer block, {HEADS} heads, {batch}×{tokens}×{size}",
        max_steps=100,
    )


def mixed_conv(batch: int = 64, size: int = 32, side: int = 16) -> Case:
    """Make a batch in which one sample needs ten times the steps of the others; the cost of f grows with the batch."""
    rng = np.random.default_rng(12)
    kernel = np.zeros((size, size, 3, 3))
    kernel[:, :, 1, 1] = np.linalg.qr(rng.standard_normal((size, size)))[0]  # an isometry, applied as a convolution
    rate = np.full((batch, 1, 1, 1), 0.35)
    rate[batch // 2] = 0.35**0.1
    inputs = {"b": narrow(0.05 * rng.standard_normal((batch, size, side, side))), "rate": narrow(rate)}
    return Case(
        Problem("mixed-conv", {"K": narrow(kernel)}, inputs, 0 * inputs["b"], {"torch": rated_torch}),
        f"tanh of a 3×3 convolution, {batch}×{size}×{side}×{side}, one sample of {batch} ten times slower",
        max_steps=300,
        uneven=True,
    )


EVERY: Final[Mapping[str, Callable[..., Case]]] = {
    "conv": conv,
    "attention": attention,
    **CASES,
    "mixed-conv": mixed_conv,
}
"""Makers of all compared cases by name; all take `batch` and `size`."""

QUICK: Final[Mapping[str, Mapping[str, int]]] = {
    "conv": {"batch": 4, "size": 16},
    "attention": {"batch": 4, "size": 16, "tokens": 8},
    "mixed-conv": {"batch": 16, "size": 8, "side": 8},
}
"""Sizes of a first look; the others take `bench.cases.QUICK`."""


COMPILED: Final[Mapping[str, Mapping[str, int]]] = {
    "dense": {},
    "affine": {},
    "slow-modes": {},
    "conv": {"batch": 8, "size": 16, "side": 8},  # XLA's convolutions in a loop on a CPU: the full size ends in hours
}
"""Cases of a compiled framework, and the sizes that they have there."""


def case(name: str, quick: bool, compiled: bool = False) -> Case:
    """Return one of the cases, small for a first look."""
    if quick:
        return EVERY[name](**QUICK.get(name, SMALL))
    return EVERY[name](**COMPILED[name] if compiled else {})
