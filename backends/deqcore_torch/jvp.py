"""Products J v in PyTorch: the transpose of the transpose, or forward mode where that is not possible."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from deqcore.errors import BackendError
from deqcore.types import Map
from deqcore_torch.graph import has_functions, once_only, sequence
from deqcore_torch.module_hooks import hooks_made, muted

NEAR_ZERO: Final = 2.0**-10
"""Cotangent at which u ↦ Jᵀu is differentiated. The backward of logcumsumexp takes logarithms of u, so that its
derivative at 0 is NaN; a backward that clips u is linear only near 0."""


def jvp(f: Map, z: Tensor, fused: bool = True) -> Map:
    """Return v ↦ J v at `z` `(batch, n)`; a gradient that is being recorded goes through the products.

    A solve that records nothing evaluates f once and differentiates its vjp: a product then costs about one vjp, while
    forward mode evaluates f again, and PyTorch takes up to a millisecond for each sum or product with a constant there.
    Forward mode is for gradients that are recorded, for f without a second derivative, and for f with a
    `torch.autograd.Function` or a hook, which may make the recorded vjp another map than Jᵀ. Fused attention, which has
    no forward mode, is evaluated by PyTorch's plain kernel then: the same to rounding.

    Args:
        f: the map on `(batch, n)`.
        z: the point `(batch, n)`.
        fused: whether attention in f may be fused.

    Raises:
        BackendError: f has a part with neither a forward-mode derivative nor a second one in reverse mode.
    """
    return _Products(f, z, fused, sought=torch.is_grad_enabled())


@dataclass
class _Products:
    """The products at one point.

    Attributes:
        f: the map.
        z: the point `(batch, n)`.
        fused: whether attention in f may be fused.
        sought: whether it is settled how products are formed.
        other: how, if not in forward mode.
    """

    f: Map
    z: Tensor
    fused: bool
    sought: bool
    other: Map | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """Return J v `(batch, n)`."""
        if not self.sought:
            self.sought = True
            try:
                recorded = _Recorded.of(self.f, self.z)
                if recorded.plain():
                    twice = _transposed_twice(recorded, "")
                    pushed = twice(v)
                    self.other = twice
                    return pushed
            except (BackendError, RuntimeError):
                pass  # forward mode may do it, or says why not
        if self.other is None:
            try:
                return _forward(self.f, self.z, v)
            except NotImplementedError as error:
                reason = str(error).splitlines()[0]
                plain = self.fused and "scaled_dot_product" in reason
                unfused = jvp(_unfused(self.f), self.z, fused=False) if plain else None
                self.other = unfused or _transposed_twice(_Recorded.of(self.f, self.z), reason)
        return self.other(v)


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


class _Recorded(NamedTuple):
    """An evaluation of f with its graph.

    Attributes:
        start: z, from which the graph begins.
        y: f(z) `(batch, n)`; needs no gradient where f recorded nothing.
        begun: number below those of the nodes that f made.
        hooks: `hooks_made()` before f ran.
    """

    start: Tensor
    y: Tensor
    begun: int
    hooks: int

    @classmethod
    def of(cls, f: Map, z: Tensor) -> _Recorded:
        start = z if torch.is_grad_enabled() and z.requires_grad else z.detach().requires_grad_()
        begun, hooks = sequence(), hooks_made()
        with torch.enable_grad():
            return cls(start, f(start), begun, hooks)

    def plain(self) -> bool:
        """Return whether f recorded PyTorch's own operations alone, without Functions and hooks of the user."""
        y = self.y
        return y.requires_grad and self.hooks == hooks_made() and not has_functions(y, self.begun)


def _transposed_twice(recorded: _Recorded, reason: str) -> Map:
    """Return v ↦ J v as the derivative of u ↦ Jᵀu: two reverse passes for all products, and one for each."""
    recording = torch.is_grad_enabled()
    if not recorded.y.requires_grad:
        return torch.zeros_like
    with torch.enable_grad():
        u = torch.full_like(recorded.y, NEAR_ZERO).requires_grad_()
        with muted(recorded.y, recorded.hooks):
            (pulled,) = torch.autograd.grad(recorded.y, recorded.start, u, create_graph=True, allow_unused=True)
    if once_only([pulled], recorded.begun):
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
