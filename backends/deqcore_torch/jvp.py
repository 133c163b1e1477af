"""Products J v in PyTorch: forward mode, or the transpose of the transpose if an operation in f does not support it."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from deqcore.errors import BackendError
from deqcore.types import Map
from deqcore_torch.graph import once_only, sequence
from deqcore_torch.module_hooks import hooks_made, muted

NEAR_ZERO: Final = 2.0**-10
"""Cotangent at which u ↦ Jᵀu is differentiated. The backward of logcumsumexp takes logarithms of u, so that its
derivative at 0 is NaN; a backward that clips u is linear only near 0."""


def jvp(f: Map, z: Tensor, fused: bool = True) -> Map:
    """Return V ↦ J v at `z` `(batch, n)`; a gradient that is being recorded goes through the products.

    Fused attention, which has no forward mode, is evaluated by PyTorch's plain kernel here: the same to rounding.

    Args:
        f: the map on `(batch, n)`.
        z: the point `(batch, n)`.
        fused: whether attention in f may be fused.

    Raises:
        BackendError: f has a part with neither a forward-mode derivative nor a second one in reverse mode.
    """
    turned: list[Map] = []  # the product to use once forward mode has failed

    def product(v: Tensor) -> Tensor:
        if not turned:
            try:
                return _forward(f, z, v)
            except NotImplementedError as error:
                reason = str(error).splitlines()[0]
                plain = fused and "scaled_dot_product" in reason
                turned.append(jvp(_unfused(f), z, fused=False) if plain else _transposed_twice(f, z, reason))
        return turned[0](v)

    return product


def _unfused(f: Map) -> Map:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def plain(z: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return f(z)

    return plain


def _forward(f: Map, z: Tensor, v: Tensor) -> Tensor:
    forward_ad = _forward_ad()
    # A solve switches off the surrounding forward mode; this product belongs to the solve itself.
    with forward_ad._set_fwd_grad_enabled(True), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(z, v))).tangent
    return torch.zeros_like(v) if tangent is None else tangent


def _transposed_twice(f: Map, z: Tensor, reason: str) -> Map:
    """Return v ↦ J v as the derivative of u ↦ Jᵀu: one recorded evaluation, then two reverse passes per product."""
    recording, begun = torch.is_grad_enabled(), sequence()
    with torch.enable_grad():
        start = z if recording and z.requires_grad else z.detach().requires_grad_()
        made = hooks_made()
        y = f(start)
        if not y.requires_grad:
            return torch.zeros_like
        u = torch.full_like(y, NEAR_ZERO).requires_grad_()
        with muted(y, made):
            (pulled,) = torch.autograd.grad(y, start, u, create_graph=True, allow_unused=True)
    if once_only([pulled], begun):
        raise BackendError.no_products(f"{reason} And its backward is marked @once_differentiable.")
    if pulled is None or not pulled.requires_grad:
        return torch.zeros_like

    def product(v: Tensor) -> Tensor:
        try:
            (pushed,) = torch.autograd.grad(pulled, u, v, create_graph=recording, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise BackendError.no_products(f"{reason} And twice in reverse mode: {error}.") from error
        return torch.zeros_like(v) if pushed is None else pushed

    return product


@cache
def _forward_ad() -> Any:
    """Enter forward mode, without the warnings of what torch loads at its first use."""
    from torch.autograd import forward_ad

    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    return forward_ad
