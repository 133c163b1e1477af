"""A differentiable estimate of the spectral radius, for a penalty that keeps a loop contractive while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.diagnostics.linearization import Linearization, linearize
from deqcore.errors import BackendError, InitialIterateError
from deqcore.types import Array, Map, Tree

FIRST: Final = 20  # iterations from random blocks, whose quotient may be far too large


class SpectralState(NamedTuple):
    """The vectors that one estimate hands to the next: blocks of two per sample, without gradients.

    Attributes:
        right: vectors for J, two arrays `(batch, n)`.
        left: vectors for Jᵀ, two arrays `(batch, n)`.

    Example:
        >>> import torch
        >>> state = spectral_penalty(lambda z: 0.5 * z, torch.zeros(2, 3)).state
        >>> state.right[0].shape
        torch.Size([2, 3])
    """

    right: tuple[Array, Array]
    left: tuple[Array, Array]


class SpectralPenalty(NamedTuple):
    """The result of `spectral_penalty`.

    Attributes:
        penalty: max(0, ρ − bound)² per sample `(batch,)`, differentiable.
        radius: the estimate of ρ per sample `(batch,)`, differentiable.
        state: for the next call.

    Example:
        >>> import torch
        >>> spectral_penalty(lambda z: 0.5 * z, torch.zeros(2, 3)).radius.tolist()
        [0.5, 0.5]
    """

    penalty: Array
    radius: Array
    state: SpectralState


def spectral_penalty(
    f: Callable[..., Tree],
    z: Tree,
    *args: Any,
    state: SpectralState | None = None,
    bound: float = 0.95,
    iterations: int = 1,
    batch: bool = True,
) -> SpectralPenalty:
    """Return max(0, ρ − bound)² per sample, where ρ estimates the spectral radius of ∂f/∂z at z.

    ‖J‖_F (`jacobian_penalty`) bounds ρ, but is far above it for wide layers, and pays for directions in which nothing
    grows. This penalty acts only where ρ exceeds `bound`. Two-sided block iteration: a block of two vectors follows the
    dominant eigenvalues of J, another one those of Jᵀ, and the eigenvalues of the 2 × 2 quotient
    (UᵀV)⁻¹ UᵀJ V are second-order accurate, for a complex pair as for a real eigenvalue and for non-normal J. With the
    blocks held still, its derivative is that of the eigenvalue: yᵀ dJ x / yᵀx.

    One or two iterations a training step suffice where the blocks are carried along, since J changes slowly; without a
    state there are at least 20. The error falls by |λ₃/λ₁| in each iteration. Where samples change from step to step,
    their Jacobians must be alike for the carried block to fit.

    Cost: 2 jvps and 2 vjps per iteration, without a gradient, and 2 vjps that are themselves recorded.

    Args:
        f: `f(z, *args)` returns a tree like z.
        z: the point, a tree of floating-point arrays: usually the solution; detached, only f is trained.
        *args: further arguments of f.
        state: that of the previous call with as many samples; None: a fixed random block.
        bound: the radius above which the penalty acts, at least 0.
        iterations: at least 1.
        batch: whether the first axis of z is the batch, as `forward.batch`.

    Returns:
        Penalty, radius and next state. In JAX the state is a value that goes into the step and comes out.

    Raises:
        BackendError: the backend has no products J v (NumPy): use `spectral_radius`, which measures.
        InitialIterateError: z is unfit as a state, or `state` is that of another shape.
        ProblemError: f returned something that is not like z.

    Source: Parlett (1974), "The Rayleigh quotient iteration and some generalizations for nonnormal matrices"; the
    derivative of an eigenvalue: Stewart & Sun (1990), "Matrix perturbation theory", §IV.2.

    Example:
        >>> import torch
        >>> a = torch.tensor([[0.0, 1.2, 0.0], [-1.2, 0.0, 0.0], [0.0, 0.0, 0.3]])  # eigenvalues ±1.2 i and 0.3
        >>> found = spectral_penalty(lambda z: z @ a, torch.zeros(1, 3), iterations=20)
        >>> round(found.radius.item(), 4), round(found.penalty.item(), 4)
        (1.2, 0.0625)
    """
    at = linearize(f, z, args, batch)
    backend, xp = at.backend, at.backend.xp
    if not backend.capabilities.autodiff:
        raise BackendError(
            f"spectral_penalty needs a backend that differentiates f itself (got {backend.name!r}). Use torch or jax, "
            f"or deqcore.diagnostics.spectral_radius, which measures on every backend."
        )
    if iterations < 1 or not bound >= 0.0:
        raise InitialIterateError(
            f"spectral_penalty needs iterations of at least 1 and a bound of at least 0 (got {iterations}, {bound})."
        )
    blocks = _start(at) if state is None else _checked(at, state)
    still = backend.detach(at.z)
    jvp, vjp = backend.autodiff.jvp(at.f, still), backend.autodiff.linearize(at.f, still)[1]
    assert jvp is not None
    for _ in range(iterations if state is not None else max(iterations, FIRST)):
        blocks = SpectralState(_advanced(backend, jvp, blocks.right), _advanced(backend, vjp, blocks.left))
    radius = _radius(backend, backend.autodiff.differentiable_vjp(at.f, at.z), blocks)
    above = xp.clip(radius - bound, min=0.0)
    return SpectralPenalty(above * above, radius, blocks)


def _start(at: Linearization) -> SpectralState:
    draw = [at.backend.numbers.normal(at.backend.detach(at.z), 0, (i,)) for i in range(4)]
    right, left = _orthonormal(at.backend, draw[0], draw[1]), _orthonormal(at.backend, draw[2], draw[3])
    return SpectralState(right, left)


def _checked(at: Linearization, state: SpectralState) -> SpectralState:
    shapes = {tuple(part.shape) for block in state for part in block}
    if shapes != {tuple(at.z.shape)}:
        raise InitialIterateError(
            f"state must be that of a call with as many samples and numbers, {tuple(at.z.shape)} (got "
            f"{sorted(shapes)}). Drop the last incomplete batch, or pass state=None."
        )
    return state


def _advanced(backend: Backend, product: Map, block: tuple[Array, Array]) -> tuple[Array, Array]:
    a, b = (backend.detach(product(vector)) for vector in block)
    return _orthonormal(backend, a, b)


def _orthonormal(backend: Backend, a: Array, b: Array) -> tuple[Array, Array]:
    """Return an orthonormal pair with the span of a and b; vectors without anything of their own become 0."""
    a = _unit(backend, a, backend.norm(a))
    scale = backend.norm(b)
    for _ in range(2):
        b = b - backend.cast(backend.inner(a, b), b)[:, None] * a
    lost = backend.norm(b) <= 8.0 * backend.eps(b) * scale
    return a, backend.select(lost, backend.xp.zeros_like(b), _unit(backend, b, backend.norm(b)))


def _unit(backend: Backend, v: Array, norm: Array) -> Array:
    safe = backend.xp.where(norm > 0, norm, backend.xp.ones_like(norm))
    return v / backend.cast(safe, v)[:, None]


def _radius(backend: Backend, vjp: Map, blocks: SpectralState) -> Array:
    """Return the largest |λ| of (UᵀV)⁻¹ UᵀJ V per sample `(batch,)`."""
    xp = backend.xp
    (u1, u2), (v1, v2) = blocks.left, blocks.right

    def dot(a: Array, b: Array) -> Array:
        return xp.sum(a * b, axis=1)

    m11, m12, m21, m22 = dot(u1, v1), dot(u1, v2), dot(u2, v1), dot(u2, v2)
    w1, w2 = vjp(u1), vjp(u2)  # uᵀJ, recorded
    n11, n12, n21, n22 = dot(w1, v1), dot(w1, v2), dot(w2, v1), dot(w2, v2)
    det = m11 * m22 - m12 * m21
    small = xp.abs(det) <= 1e-3 * (xp.abs(m11) + xp.abs(m12)) * (xp.abs(m21) + xp.abs(m22))
    safe = xp.where(small, xp.ones_like(det), det)
    trace = (m22 * n11 - m12 * n21 + m11 * n22 - m21 * n12) / safe
    product = (n11 * n22 - n12 * n21) / safe
    pair = _largest(xp, trace, product)
    # A block that has collapsed to one vector, or blocks that hardly see each other: the quotient of the first ones.
    single = xp.abs(n11 / xp.where(m11 == 0, xp.ones_like(m11), m11))
    return xp.where(small, single, pair)


def _largest(xp: Any, trace: Array, product: Array) -> Array:
    """Return the largest modulus of the roots of λ² − trace λ + product = 0; its derivative is finite everywhere."""
    quarter = trace * trace / 4 - product
    is_pair = quarter < 0
    one = xp.ones_like(quarter)
    root = xp.where(quarter > 0, xp.sqrt(xp.where(quarter > 0, quarter, one)), xp.zeros_like(quarter))
    modulus = xp.sqrt(xp.where(is_pair & (product > 0), product, one))
    return xp.where(is_pair, modulus, xp.abs(trace) / 2 + root)
