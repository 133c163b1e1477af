"""Norms of residuals and projections onto a basis, by fused kernels if a backend has them; the default tolerance."""

from __future__ import annotations

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.types import Array, Map

CANCELLED = 0.5**0.5
"""Part of a norm that a projection must leave. If it leaves less, the rounding of what it took away is large relative
to the rest, and errors of orthogonality grow from step to step."""


def residual_norms(backend: Backend, z: Array, fz: Array) -> tuple[Array, Array]:
    """Return ‖f(z) − z‖ and ‖f(z)‖ of each row `(batch,)`, as `Backend.norm` gives them."""
    fused = None if backend.kernels is None else backend.kernels.residual_norms(z, fz)
    return (backend.norm(fz - z), backend.norm(fz)) if fused is None else fused


def unmeasured(backend: Backend, z: Array) -> Array:
    """Return NaN for each row `(batch,)`, in the dtype of `Backend.norm`, without reading all of `z` `(batch, n)`."""
    xp = backend.xp
    return xp.full_like(backend.norm(xp.ones_like(z[:, :1])), float("nan"))


def orthogonalize(backend: Backend, basis: History, w: Array, twice: bool) -> tuple[Array, Array, Array, Array]:
    """Return `w` `(batch, n)` without its components h in the orthonormal `basis`, and h, ‖w‖ before, ‖w‖ after.

    With `twice` it is projected once more where less than `CANCELLED` of its norm is left, so that the rest is
    orthogonal to rounding. A backend that must wait to know where that is may project all of them. h
    `(batch, history_size)` and the norms `(batch,)` are in the wide dtype.

    Source: Daniel, Gragg, Kaufman & Stewart (1976), "Reorthogonalization and stable algorithms for updating the
    Gram-Schmidt QR factorization".
    """
    fused = None if backend.kernels is None else backend.kernels.orthogonalize(basis, w, twice)
    return project(backend, basis, w, twice, backend.norm) if fused is None else fused


def project(
    backend: Backend, basis: History, w: Array, twice: bool, norm: Map, *, conditional: bool = False
) -> tuple[Array, Array, Array, Array]:
    """Return what `orthogonalize` does, by operations of the backend.

    Args:
        backend: whose arrays these are.
        basis: orthonormal vectors.
        w: `(batch, n)`.
        twice: see `orthogonalize`.
        norm: `v ↦ ‖v‖` of each row `(batch,)`.
        conditional: trace a condition that leaves the second projection out where no row needs it.
    """
    before = backend.to_accum_dtype(norm(w))
    h = basis.dot(w)
    w = w - basis.combine(h)
    after = backend.to_accum_dtype(norm(w))
    enough = after >= CANCELLED * before
    if not twice or backend.known_all(enough):
        return w, h, before, after

    def again(once: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w, h, after = once
        more = basis.dot(w)
        w = backend.select(enough, w, w - basis.combine(more))
        return w, backend.select(enough, h, h + more), backend.select(enough, after, backend.to_accum_dtype(norm(w)))

    once = w, h, after
    w, h, after = backend.cond(~enough, again, once) if conditional else again(once)
    return w, h, before, after


def default_rtol(backend: Backend, x: Array) -> float:
    """Return the value of rtol = "auto": √eps, at most 1e-4, but at least 2·eps.

    float64 1.5e-8, float32 1e-4, float16 2e-3, bfloat16 1.6e-2.
    """
    eps = float(backend.guards.output_eps(x))
    return float(max(2 * eps, min(1e-4, eps**0.5)))
