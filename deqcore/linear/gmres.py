"""Batched, matrix-free GMRES on a History."""

from __future__ import annotations

from typing import NamedTuple

from deqcore.backend import Array, Backend, History, Map


class Krylov(NamedTuple):
    """The loop state of GMRES with at most m steps. Small arrays are in the wide dtype."""

    basis: History  # orthonormal v_0 … v_k, m + 1 slots
    columns: History  # columns of the Hessenberg matrix, m slots of length m + 1
    v: Array  # latest basis vector (batch, n)
    null: Array  # ν with νᵀH̄ = 0 (batch, m + 1)
    square: Array  # ‖ν‖² (batch,)
    residual: Array  # ‖b − A x‖ (batch,)
    running: Array  # (batch,) of bool
    steps: Array  # (batch,) int32


class LinearSolution(NamedTuple):
    """What GMRES found.

    Attributes:
        x: solution `(batch, n)`.
        residual: ‖b − A x‖ per sample, by the recurrence, `(batch,)`.
        products: products with A per sample, `(batch,)` int32.
        converged: `(batch,)` of bool.
    """

    x: Array
    residual: Array
    products: Array
    converged: Array


def gmres(
    backend: Backend,
    product: Map,
    b: Array,
    x0: Array | None = None,
    *,
    rtol: float | Array,
    max_steps: int,
    reorthogonalize: bool = True,
    check_every: int | str = "auto",
) -> LinearSolution:
    """Solve A x = b for each sample, with A given by its product.

    Every sample has a Krylov space of its own and stops at the first step that meets its tolerance: the result does
    not depend on its batch mates, and no sample can make another fail.

    Instead of rotating the Hessenberg matrix H̄ in every step, the loop carries the one vector ν with νᵀH̄ = 0, from
    which the least residual is β ν₀/‖ν‖: O(k) work a step in place of O(k²), and a single small solve at the end.

    Args:
        backend: whose arrays these are.
        product: `v ↦ A v` on `(batch, n)`; called once per step for the whole batch.
        b: right-hand side `(batch, n)`.
        x0: start `(batch, n)`, default zero (which saves one product).
        rtol: stop when ‖b − A x‖ ≤ rtol·‖b‖.
        max_steps: size of the Krylov space at most; there is no restart.
        reorthogonalize: project twice, so that the basis stays orthogonal to rounding (two more passes a step).
        check_every: see `Backend.loop`.

    Source: Saad & Schultz (1986), "GMRES: a generalized minimal residual algorithm"; the residual from the null
    vector: Ayachour (2003), "A fast implementation for GMRES method"; twice is enough: Giraud et al. (2005).
    """
    xp = backend.xp
    r = b if x0 is None else b - product(x0)
    norm = backend.wide(backend.norm(r))
    goal = rtol * backend.wide(backend.norm(b))
    size = max(1, max_steps)
    v = _divide(backend, r, norm)
    basis = backend.history(b, size + 1).append(v)
    null = backend.cast(basis.slot(), norm)[None, :] + 0 * norm[:, None]  # (batch, m + 1)
    start = Krylov(
        basis=basis,
        columns=backend.history(null, size),
        v=v,
        null=null,
        square=xp.ones_like(norm),
        residual=norm,
        running=(norm > goal) & xp.isfinite(norm),
        steps=xp.zeros_like(norm, dtype=xp.int32),
    )

    def running(k: Krylov) -> Array:
        return xp.any(k.running)

    def body(k: Krylov) -> Krylov:
        return _arnoldi_step(backend, product, k, goal, reorthogonalize)

    end = backend.loop(running, body, start, max_steps, check_every)
    update = end.basis.with_active(None).combine(_coefficients(backend, end, norm))
    x = update if x0 is None else x0 + update
    products = end.steps if x0 is None else end.steps + 1
    return LinearSolution(x, end.residual, products, end.residual <= goal)


def _arnoldi_step(backend: Backend, product: Map, k: Krylov, goal: Array, twice: bool) -> Krylov:
    xp = backend.xp
    active = k.running
    w = product(k.v)
    scale = backend.wide(backend.norm(w))
    h = k.basis.dot(w)
    w = w - k.basis.combine(h)
    if twice:
        more = k.basis.dot(w)
        w = w - k.basis.combine(more)
        h = h + more
    height = backend.wide(backend.norm(w))
    floor = 4 * xp.finfo(w.dtype).eps * scale
    broke = height <= floor  # the space is invariant: the solution in it is exact, or A is singular
    height = xp.where(broke, floor, height)
    v = _divide(backend, w, height)

    following = backend.cast(xp.roll(k.basis.slot(), 1), height)[None, :]
    entry = -xp.sum(k.null * h, axis=1) / height
    square = k.square + entry * entry
    residual = k.residual * xp.sqrt(k.square / square)
    taken = active & xp.isfinite(residual)
    going = taken & (residual > goal) & ~broke
    null = k.null + entry[:, None] * following
    return Krylov(
        basis=k.basis.with_active(going).append(v),
        columns=k.columns.with_active(taken).append(h + height[:, None] * following),
        v=v,
        null=xp.where(taken[:, None], null, k.null),
        square=xp.where(taken, square, k.square),
        residual=xp.where(taken, residual, k.residual),
        running=going,
        steps=k.steps + xp.astype(active, xp.int32),
    )


def _coefficients(backend: Backend, k: Krylov, norm: Array) -> Array:
    """The minimiser y of ‖β e₀ − H̄ y‖, padded to `(batch, m + 1)`.

    The least residual vector is r̂ = β ν ν₀ / ‖ν‖², and rows 1 … k of H̄ are triangular, so H̄ y = β e₀ − r̂ is solved
    there. Columns that a sample did not reach get a unit diagonal, and y = 0.
    """
    xp = backend.xp
    columns = k.columns.with_active(None).vectors()  # (batch, used, m + 1)
    used = columns.shape[1]
    if used == 0:
        return 0 * k.null
    below = columns[:, :, 1 : used + 1]
    eye = xp.eye(used, dtype=below.dtype, device=below.device)[None]
    reached = xp.sum(below * eye, axis=2) > 0  # (batch, used)
    filled = below + eye * backend.cast(~reached, below)[:, None, :]
    target = -k.null[:, 1 : used + 1] * (norm * k.null[:, 0] / k.square)[:, None]
    y = backend.solve(xp.permute_dims(filled, (0, 2, 1)), xp.where(reached, target, xp.zeros_like(target)))
    y = xp.where(xp.isfinite(y), y, xp.zeros_like(y))
    rest = xp.zeros_like(k.null)[:, used:]
    return xp.concat([y, rest], axis=1)


def _divide(backend: Backend, v: Array, norm: Array) -> Array:
    """v / norm per row, zero where the norm is zero."""
    xp = backend.xp
    inverse = xp.where(norm > 0, 1.0 / xp.where(norm > 0, norm, xp.ones_like(norm)), xp.zeros_like(norm))
    return v * backend.cast(inverse, v)[:, None]
