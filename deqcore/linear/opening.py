"""Plain steps that open a linear solve in traced code, before GMRES allocates a basis."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.scaling import divide_rows, multiply_rows, row_scale
from deqcore.linear.gmres import LinearSolution, gmres
from deqcore.types import Array, Map

UNKNOWNS: Final = 128
"""Smallest n that is opened. With fewer unknowns GMRES ends early, and its basis costs little."""

RATE: Final = 0.68
"""Part of the residual that plain steps may leave in the mean. A sample that keeps more continues with GMRES."""

STEPS: Final = 60
"""Plain steps at most."""

YOUNG: Final = 3
"""Steps after which a sample that will end a third later than planned still takes plain steps. GMRES after many of them
costs a batch more than a few more of them."""


class _Plain(NamedTuple):
    x: Array  # (batch, n), of the dtype of norms: a sum of many steps in float16 would round each of them
    r: Array  # b − A x (batch, n)
    norm: Array  # ‖r‖ (batch,)
    products: Array  # (batch,) int32
    running: Array  # (batch,) of bool


def opened(
    backend: Backend,
    product: Map,
    b: Array,
    *,
    rtol: float,
    max_steps: int,
    reorthogonalize: bool,
    restart: int,
) -> LinearSolution:
    """Solve (I − J) x = b by plain steps x ← x + r, r ← J r, and by GMRES where they contract slowly.

    A plain step costs its product and two passes over `(batch, n)`. A step of GMRES passes over its basis, which in
    compiled code takes several times as long as the product with a dense cell of some hundred units. Each sample
    decides by its own residuals: it continues with GMRES from where it is if the rate of its last step would not bring
    it to the goal within the steps that `RATE` needs. A step that does not reduce the residual is not taken. GMRES and
    its basis are one branch of a condition, so that a batch without such a sample does not allocate the basis.

    Args:
        backend: the backend of these arrays.
        product: `v ↦ J v` on `(batch, n)`.
        b: right-hand side `(batch, n)`.
        rtol: stop when ‖b − A x‖ ≤ rtol·‖b‖.
        max_steps: products of GMRES at most; at most `STEPS` of plain steps come before.
        reorthogonalize: see `gmres`.
        restart: see `gmres`.
    """
    xp = backend.xp
    size = backend.norm(b)
    goal = rtol * backend.to_accum_dtype(size)
    plain = _plain_steps(backend, product, b, size, goal, planned_steps(rtol))
    met = (plain.norm <= goal) & xp.isfinite(plain.norm)
    residual = xp.maximum(plain.norm, rounding_of_steps(backend, plain.x, b))
    ended = LinearSolution(plain.x, residual, plain.products, met & (residual <= goal), ~met)

    def by_gmres(ended: LinearSolution) -> LinearSolution:
        # J r is nearly a multiple of r after many steps: a space of r would be projected twice in every step.
        r = backend.select(met, xp.zeros_like(b), plain.r)
        rest = gmres(
            backend, product, b, plain.x, r,
            rtol=rtol, max_steps=max_steps, reorthogonalize=reorthogonalize, restart=restart, shifted=True,
        )  # fmt: skip
        return LinearSolution(
            rest.x,
            xp.where(met, ended.residual, rest.residual),
            ended.products + rest.products,
            xp.where(met, ended.converged, rest.converged),
            ~met & rest.spent,
        )

    solution: LinearSolution = backend.choose(~met, by_gmres, lambda same: same, ended)
    return solution


def rounding_of_steps(backend: Backend, x: Array, like: Array) -> Array:
    """Return the residual `(batch,)` that rounding hides of x, a sum of plain steps r in the dtype of `like`.

    A r = r − J r.
    """
    return backend.eps(like) * (1 + RATE**2) ** 0.5 * backend.to_accum_dtype(backend.norm(x))


def planned_steps(rtol: float) -> int:
    """Return the steps in which `RATE` reaches the tolerance, `STEPS` at most."""
    return STEPS if rtol <= 0.0 else min(STEPS, max(YOUNG, math.ceil(math.log(rtol) / math.log(RATE))))


def _plain_steps(backend: Backend, product: Map, b: Array, size: Array, goal: Array, early: int) -> _Plain:
    """Take plain steps from zero while they contract, so that they end in `early` steps, or in a third more later."""
    late = min(STEPS, (4 * early + 2) // 3)
    xp, scale = backend.xp, row_scale(backend, size, b)  # squares of small residuals stay in the range
    goal = goal if scale is None else goal / backend.to_accum_dtype(scale)

    def step(at: _Plain) -> _Plain:
        image = product(at.r)
        norm = xp.sqrt(backend.inner(image, image))
        taken = at.running & (norm < at.norm)  # False for NaN
        products = at.products + xp.astype(at.running, xp.int32)
        planned = xp.where(products <= YOUNG, early, late) - products
        ahead = norm * (norm / at.norm) ** backend.cast(planned, norm)
        return _Plain(
            backend.select(taken, at.x + backend.cast(at.r, at.x), at.x),
            backend.select(taken, image, at.r),
            xp.where(taken, norm, at.norm),
            products,
            taken & (norm > goal) & (ahead <= goal),
        )

    r = divide_rows(backend, b, scale)
    norm = xp.sqrt(backend.inner(r, r))
    start = _Plain(backend.cast(xp.zeros_like(b), size), r, norm, xp.zeros_like(norm, dtype=xp.int32), norm > goal)
    end = backend.loop(lambda at: xp.any(at.running), step, start, late)
    norm = end.norm if scale is None else end.norm * backend.to_accum_dtype(scale)
    x, r = backend.cast(multiply_rows(backend, end.x, scale), b), multiply_rows(backend, end.r, scale)
    return end._replace(x=x, r=r, norm=norm)
