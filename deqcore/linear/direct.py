"""Solve (I − Jᵀ) u = g with the matrix itself: what is left for small systems that GMRES cannot solve."""

from __future__ import annotations

from typing import Final, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.types import Array, Map

ENTRIES: Final = 2**24
"""Numbers in the matrices that are solved at a time; a batch with more of them is solved in parts."""

REFINED: Final = 2
"""Solves of each system: the second one removes what elimination in float32 left of the residual."""


class Direct(NamedTuple):
    """What the direct solve led to.

    Attributes:
        u: solution `(batch, n)`; what was given where it is no better.
        residual: ‖g + Jᵀu − u‖ by a product of its own, `(batch,)`.
        vjps: products spent by the sample `(batch,)` int32.
    """

    u: Array
    residual: Array
    vjps: Array


def solve_direct(backend: Backend, vjp: Map, g: Array, wanted: Array, before: Direct) -> Direct:
    """Replace `before` in the `wanted` rows by the solution of the dense system, where that has a smaller residual.

    One product for each unit vector serves all samples, and one more measures the residual: n + 1 products. Nothing is
    done where no row is wanted. A singular system keeps what it had, as does one that has no finite solution.

    Args:
        backend: whose arrays these are.
        vjp: `u ↦ Jᵀu`, row by row.
        g: cotangent `(batch, n)`.
        wanted: rows to solve `(batch,)` of bool.
        before: what is known of all rows.
    """
    batch, n = g.shape
    size = max(1, ENTRIES // max(1, n * n))
    # An exported program may have a batch without a size, which is solved at once.
    parts = max(1, -(-batch // size)) if isinstance(batch, int) else 1

    def solved(carry: tuple[Array, Direct]) -> tuple[Array, Direct]:
        waiting, best = carry
        if parts == 1:
            return waiting & ~waiting, _taken(backend, vjp, g, waiting, _solve(backend, vjp, g, None), best)
        first = backend.xp.argsort(backend.xp.astype(~waiting, backend.xp.int32), stable=True)
        place = backend.xp.argsort(first, stable=True)  # where a row stands among them
        now = waiting & (place < size)
        part = _solve(backend, vjp, g, first[:size])
        own = backend.xp.where(now, place, 0 * place)
        u, size_of = (backend.take(each, own) for each in part)
        return waiting & ~now, _taken(backend, vjp, g, now, (u, size_of), best)

    if parts == 1:
        return backend.cond(wanted, solved, (wanted, before))[1]
    return backend.loop(lambda carry: backend.xp.any(carry[0]), solved, (wanted, before), parts, 1)[1]


def _solve(backend: Backend, vjp: Map, g: Array, rows: Array | None) -> tuple[Array, Array]:
    """u of these rows (of all without) in the dtype of `g`, and the largest norm of a column of I − Jᵀ."""
    xp = backend.xp
    n = g.shape[1]
    side = g if rows is None else backend.take(g, rows)
    unit = backend.cast(backend.linalg.eye(g, 1, n), g) + xp.zeros_like(g)

    def column(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        unit, history = carry
        image = vjp(unit)
        return xp.roll(unit, 1, axis=1), history.append(image if rows is None else backend.take(image, rows))

    _, history = backend.scan(column, (unit, backend.history(side, n)), n)
    images = backend.to_accum_dtype(xp.permute_dims(history.vectors(), (0, 2, 1)))
    matrix = backend.linalg.eye(images, n)[None] - images
    side = backend.to_accum_dtype(side)

    def refined(u: Array) -> Array:
        return u + backend.linalg.solve(matrix, side - xp.matmul(matrix, u[:, :, None])[:, :, 0])

    u = backend.scan(refined, xp.zeros_like(side), REFINED)
    return u, xp.sqrt(xp.max(xp.sum(matrix * matrix, axis=1), axis=1))


def _taken(backend: Backend, vjp: Map, g: Array, rows: Array, solution: tuple[Array, Array], best: Direct) -> Direct:
    """Merge the solution of these rows. Their residual is measured, and at least the rounding."""
    xp = backend.xp
    wide, size = solution
    u = backend.cast(wide, g)
    rounding = backend.eps(u) * size * backend.to_accum_dtype(backend.norm(u))
    residual = xp.maximum(backend.to_accum_dtype(backend.norm(g + vjp(u) - u)), rounding)
    better = rows & xp.isfinite(residual) & ~(residual > best.residual)
    return Direct(
        backend.select(better, u, best.u),
        xp.where(better, backend.cast(residual, best.residual), best.residual),
        best.vjps + xp.astype(rows, xp.int32) * (g.shape[1] + 1),
    )
