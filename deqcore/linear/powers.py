"""The powers (Jᵀ)^j g from a Krylov space that is there, and inner products of the gradients that they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.kernels import Krylov
from deqcore.types import Array

ENTRIES: Final = 2**18
"""Numbers of one parameter array that count, every s-th of a larger one, so that m gradients take little memory."""


class _Powers(NamedTuple):
    c: Array  # coefficients of the next power in the basis (batch, slots)
    seen: History  # the gradients so far, one row
    gram: Array  # (m + 1, m + 1), lower triangle
    at: Array  # one-hot of the next row (m + 1,)


def powers_gram(
    backend: Backend,
    k: Krylov,
    first: Array,
    u: Array,
    sound: Array,
    count: int,
    parameter_vjp: Callable[[Array], tuple[Array, ...]] | None,
    formed: Array | int | None = None,
) -> tuple[Array, Array | int]:
    """Return inner products of the gradients of u, g, Jᵀg, …, (Jᵀ)^(count−1) g.

    A V = V H̄ gives Jᵀ V c = V (c − H̄ c), so that no power costs a vjp. The products with ∂f/∂θ are linear in u: with
    the same coefficients for all samples, every polynomial of the powers is a combination of these gradients.

    Args:
        backend: whose arrays these are.
        k: a space for I − Jᵀ with at least `formed` − 1 dimensions, or one that has closed.
        first: one-hot slot of the first basis vector `(batch, slots)`.
        u: solution of u = g + Jᵀu `(batch, n)`.
        sound: samples that count `(batch,)` of bool.
        count: number of powers.
        parameter_vjp: as in `PassInputs`; None: the vectors themselves are compared.
        formed: powers that are formed, may be a traced scalar; the entries of the others are zero. None: all.

    Returns:
        `(count + 1, count + 1)`, in the wide dtype and in units of its first entry's root; and the number of products
        with the parameters.
    """
    xp = backend.xp
    zero = xp.zeros_like(u)
    counted = backend.select(sound, u, zero)
    pack, target, extra = _packing(backend, counted, parameter_vjp)
    size = backend.norm(target)
    usable = xp.isfinite(size) & (size > 0)
    unit = xp.where(usable, size, xp.ones_like(size))

    def scaled(p: Array) -> Array:
        return p / backend.cast(unit, p)[:, None]

    eye = backend.linalg.eye(k.start, count + 1)
    seen = backend.history(target, count + 1).append(scaled(target))
    gram = eye[0][:, None] * seen.dot(scaled(target))
    columns = k.columns.masked(None).vectors()
    slots = first.shape[1]
    basis, hessenberg, source = k.basis.masked(None), columns[:, :, :slots], columns[:, :, slots:]

    def following(c: Array) -> Array:
        if columns.shape[1] == 0:
            return c
        weights = xp.matmul(source, c[:, :, None])[:, :, 0]
        return c - xp.matmul(weights[:, None, :], hessenberg)[:, 0, :]

    def step(p: _Powers) -> _Powers:
        g = scaled(pack(backend.select(sound, basis.combine(p.c), zero)))
        seen = p.seen.append(g)
        return _Powers(following(p.c), seen, p.gram + p.at[:, None] * seen.dot(g), xp.roll(p.at, 1))

    start = _Powers(first * xp.where(sound, k.start, 0 * k.start)[:, None], seen, gram, eye[1])
    formed = count if formed is None else formed
    end = backend.loop(lambda _: eye[0, 0] > 0, step, start, formed)
    lower = end.gram + xp.permute_dims(end.gram, (1, 0)) - end.gram * eye
    bad = xp.full_like(lower, float("nan"))
    return xp.where(usable[0], lower, bad), formed + 1 + extra if parameter_vjp is not None else 0


def _packing(
    backend: Backend, u: Array, parameter_vjp: Callable[[Array], tuple[Array, ...]] | None
) -> tuple[Callable[[Array], Array], Array, int]:
    """Return `v ↦` one row `(1, L)` of gradient entries, that of u, and the products beyond it that this took.

    An array that carries the batch, such as an output of an earlier layer, counts as its sum over the batch: so do the
    parameters that it comes from. An array with as many rows as the batch is of that kind if numbers in the first half
    of the batch leave nothing in its second half. They are not those of u, which is zero for samples that do not count.
    """
    xp, (batch, n) = backend.xp, u.shape
    if parameter_vjp is None:
        return lambda v: xp.reshape(v, (1, batch * n)), xp.reshape(u, (1, batch * n)), 0

    def products(v: Array) -> list[Array]:
        parts = parameter_vjp(v)
        return [backend.numbers.to_pairs(p) if "complex" in backend.dtype_name(p) else p for p in parts]

    own = products(u)
    alike = [part.ndim > 0 and part.shape[0] == batch for part in own]
    carried: list[Array | None] = [None] * len(own)
    if any(alike):
        half = backend.asarray([i < batch // 2 for i in range(batch)], like=u) > 0
        numbers = backend.cast(backend.asarray(np.cos(np.arange(1.0, n + 1.0)), like=u), u)
        probe = products(backend.select(half, numbers + xp.zeros_like(u), xp.zeros_like(u)))
        carried = [xp.all(p[batch // 2 :] == 0) if same else None for p, same in zip(probe, alike, strict=True)]

    def row(each: list[Array]) -> Array:
        parts = []
        for part, carries in zip(each, carried, strict=True):
            if carries is None:
                parts.append(_thinned(xp, part))
                continue
            parts.append(xp.where(carries, 0 * _thinned(xp, part), _thinned(xp, part)))
            total = _thinned(xp, xp.sum(part, axis=0))
            parts.append(xp.where(carries, total, 0 * total))
        return xp.reshape(xp.concat([backend.cast(part, u) for part in parts]), (1, -1))

    return lambda v: row(products(v)), row(own), int(any(alike))


def _thinned(xp: Any, part: Array) -> Array:
    """Return the entries of a gradient that count, as one row."""
    flat = xp.reshape(part, (-1,))
    stride = -(-flat.shape[0] // ENTRIES)
    while stride > 1 and math.gcd(stride, part.shape[-1]) > 1:
        stride += 1
    return flat[::stride] if stride > 1 else flat
