"""Measurements that a strategy's own report cannot replace: the true adjoint residual, and whether f couples rows.

A Krylov solver trusts its recurrence, which assumes that the rows of a state are independent samples. If f couples them
(a state of features × nodes, batch normalization in training mode, attention over the first axis), the recurrence
reports convergence to an equation that is not the user's. Two vector–Jacobian products find this out:

- `adjoint_residual` measures ‖g + Jᵀu − u‖ / ‖g‖ with one product;
- `leaks` takes a cotangent that is zero in half of the rows: its product must be zero in the same rows.

`coupled_rows` finds the same without derivatives: it moves rows of the state and looks at all other rows of f.

All functions but `random_halves`, `leak_everywhere`, `leaking_pair`, `coupled_rows` and
`coupled_pair` work in traced code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy
from deqcore.linear.norms import default_rtol
from deqcore.options import option_values
from deqcore.types import AdjointReport, Array, Map, Status

ROUNDING: Final = 100.0  # units of rounding below which a difference is ignored
NARROW: Final = 10 * 2.0**-8  # of a product whose factors were rounded to bfloat16
GOLDEN: Final = 0.6180339887498949  # whose multiples are spread evenly over the fractions
MOVE: Final = 0.05  # by which `coupled_rows` moves a state, relative
LAST_BITS: Final = 8.0  # units of rounding that memory alignment may change in a value of f


class Halves(NamedTuple):
    """A random cotangent that is zero in half of the rows.

    Attributes:
        rows: the rows where it may differ from zero, `(batch,)` of bool.
        weights: of the rows, `(batch,)`.
        direction: that all rows share, `(n,)`.
    """

    rows: Any
    weights: Any
    direction: Any


def random_halves(batch: int, n: int, seed: int) -> Halves:
    """Choose half of the rows, and a direction, on the host.

    Args:
        batch: number of rows.
        n: numbers in a row.
        seed: of the choice; other seeds split the rows differently, so that each pair is separated sooner or later.

    Returns:
        NumPy arrays.
    """
    rng = np.random.default_rng(seed)
    rows = np.zeros(batch, bool)
    rows[rng.permutation(batch)[: batch // 2]] = True
    return Halves(rows, rng.uniform(0.5, 1.5, batch), rng.standard_normal(n))


def traced_halves(backend: Backend, like: Array, seed: Array) -> Halves:
    """Choose random halves in traced code, by the order of quasi-random numbers.

    Args:
        backend: whose arrays these are.
        like: an array `(batch, n)` of the state's dtype.
        seed: int32, 0 or above; only its last 12 bits count.

    Returns:
        Arrays of the backend.
    """
    xp, (batch, n) = backend.xp, like.shape
    step = backend.to_accum_dtype(seed % 4096 + 1)
    places = np.random.default_rng(batch).uniform(0.25, 0.75, batch)
    spread = backend.asarray(places, like=step) * step
    spread = spread - xp.floor(spread)
    rows = spread < xp.sort(spread)[batch // 2]
    turns = GOLDEN * (1.0 + backend.to_accum_dtype(xp.arange(n)))
    return Halves(rows, 0.5 + spread, 1.5 * (turns - xp.floor(turns)) - 0.5)


def cotangent(backend: Backend, halves: Halves, like: Array) -> Array:
    """Return the cotangent `(batch, n)` of `halves`, in the dtype and on the device of `like`."""
    xp = backend.xp
    weights = backend.asarray(halves.rows, like=like) * backend.asarray(halves.weights, like=like)
    return xp.reshape(weights, (-1, 1)) * xp.reshape(backend.asarray(halves.direction, like=like), (1, -1))


def adjoint_residual(backend: Backend, vjp: Map, g: Array, u: Array) -> Array:
    """‖g + Jᵀu − u‖ / ‖g‖ per row, by one vector–Jacobian product.

    Args:
        backend: whose arrays these are.
        vjp: `u ↦ Jᵀu`.
        g: cotangent `(batch, n)`.
        u: solution `(batch, n)`.

    Returns:
        `(batch,)` in the wide dtype. A row whose cotangent is zero is compared with the largest cotangent, since
        only another row can have caused its residual.
    """
    xp = backend.xp
    left, size = backend.to_accum_dtype(backend.norm(g + vjp(u) - u)), backend.to_accum_dtype(backend.norm(g))
    known = xp.where(xp.isfinite(size), size, xp.zeros_like(size))
    scale = xp.where(size == 0, xp.zeros_like(size) + xp.max(known), size) if size.shape[0] else size
    return xp.where(left == 0, left, left / xp.where(scale == 0, xp.ones_like(scale), scale))


def leaks(backend: Backend, vjp: Map, halves: Halves, like: Array) -> Array:
    """Measure how much of a vector–Jacobian product lands in rows where its cotangent is zero.

    Args:
        backend: whose arrays these are.
        vjp: `u ↦ Jᵀu`.
        halves: the cotangent, see `random_halves`.
        like: an array `(batch, n)` of the state's dtype and device.

    Returns:
        `(batch,)` in the wide dtype: the norm of the row relative to the largest row. It is zero in rows that `halves`
        holds, in rows that are not finite, and where it is no more than rounding. Anything else shows that f couples
        the rows.
    """
    xp = backend.xp
    v = cotangent(backend, halves, like)
    given, norms = backend.to_accum_dtype(backend.norm(v)), backend.to_accum_dtype(backend.norm(vjp(v)))
    norms = xp.where(xp.isfinite(norms), norms, xp.zeros_like(norms))
    if not norms.shape[0]:
        return norms
    outside = backend.asarray(halves.rows, like=given) == 0
    noise = min(ROUNDING * backend.eps(like), 1e-2) * xp.maximum(xp.max(norms), xp.max(given))
    leaked = outside & (norms > noise)
    return xp.where(leaked, norms / xp.where(leaked, xp.max(norms), xp.ones_like(norms)), xp.zeros_like(norms))


def leak_everywhere(backend: Backend, vjp: Map, like: Array) -> float:
    """Return the largest of `leaks` over halves that separate every pair of rows, for 2 log₂(batch) products.

    Args:
        backend: whose arrays these are; outside of traced code.
        vjp: `u ↦ Jᵀu`.
        like: an array `(batch, n)` of the state's dtype and device.

    Returns:
        0 where f treats each row alone.
    """
    batch, n = like.shape
    whole = random_halves(batch, n, seed=0)
    leaked = [backend.to_numpy(leaks(backend, vjp, whole._replace(rows=rows), like)) for rows in _groups(batch)]
    return float(max((norms.max() for norms in leaked), default=0.0))


def verified(
    backend: Backend, strategy: Strategy, vjp: Map, g: Array, u: Array, report: AdjointReport, halves: Halves
) -> AdjointReport:
    """Replace the residual of a report by the measured one, and update the status.

    Args:
        backend: whose arrays these are.
        strategy: that made the report.
        vjp: `u ↦ Jᵀu`.
        g: cotangent `(batch, n)`.
        u: what the strategy returned `(batch, n)`.
        report: what it reported.
        halves: see `random_halves`; only batches of two rows and more need it.

    Returns:
        The report with the true `residual`. Where that contradicts the reported one, the status is STALLED (NONFINITE
        where it is not finite) and `error` is NaN. `coupling` holds what `leaks` returns, and `verify_vjps` the
        number of products spent here; `vjps` is unchanged.
    """
    xp = backend.xp
    true = backend.cast(adjoint_residual(backend, vjp, g, u), report.residual)
    several = g.shape[0] > 1
    coupling = leaks(backend, vjp, halves, g) if several else xp.zeros_like(backend.to_accum_dtype(true))
    coupled = coupling > 0
    coupled = xp.zeros_like(coupled) | xp.any(coupled)
    wrong = _contradicts(backend, strategy, g, u, true, report.residual, coupled) & (
        report.status == int(Status.CONVERGED)
    )
    status = xp.where(wrong, xp.full_like(report.status, int(Status.STALLED)), report.status)
    status = xp.where(wrong & ~xp.isfinite(true), xp.full_like(report.status, int(Status.NONFINITE)), status)
    coupling = backend.cast(coupling, report.residual)
    doubtful = wrong | coupled
    return report._replace(
        status=status,
        residual=true,
        error=xp.where(doubtful, xp.full_like(report.error, float("nan")), report.error),
        coupling=coupling,
        verify_vjps=xp.zeros_like(report.vjps) + (2 if several else 1),
    )


def _contradicts(
    backend: Backend, strategy: Strategy, g: Array, u: Array, true: Array, report: Array, coupled: Array
) -> Array:
    """Return where the measured residual exceeds both the reported one, by more than rounding, and the promised one.

    A strategy that promises an accuracy but reports no residual is held to its promise. Products in float32 may be
    rounded to 8 bits on the way (autocast, TF32) without a trace. Such noise excuses a residual, unless f couples rows.
    """
    xp = backend.xp
    promised = option_values(strategy).get("rtol")
    if not strategy.exact and not isinstance(promised, float):
        report = xp.where(
            xp.isnan(report), xp.full_like(report, float("inf")), report
        )  # nothing that could be contradicted
    promised = promised if isinstance(promised, float) else default_rtol(backend, g)
    g_norm, u_norm = backend.to_accum_dtype(backend.norm(g)), backend.to_accum_dtype(backend.norm(u))
    growth = 1.0 + u_norm / xp.where(g_norm > 0, g_norm, xp.ones_like(g_norm))
    sharp = xp.zeros_like(growth) + ROUNDING * backend.eps(g)
    noise = sharp if backend.dtype_name(g) == "float64" else xp.where(coupled, sharp, xp.full_like(sharp, NARROW))
    rounding = noise * xp.where(g_norm > 0, growth, xp.ones_like(growth))
    stated = xp.where(xp.isnan(report), xp.zeros_like(report), report)
    allowed = 1.5 * backend.to_accum_dtype(stated) + xp.maximum(rounding, xp.zeros_like(rounding) + promised)
    return xp.isfinite(stated) & ~(backend.to_accum_dtype(true) <= allowed)


def failing(backend: Backend, report: AdjointReport, g: Array) -> Array:
    """Return which samples' adjoint solves failed, `(batch,)` of bool; works in traced code.

    A sample that got the strategy's fallback has not failed. Nor has one whose cotangent `g` `(batch, n)` is not
    finite: its gradient is not finite either, which a gradient scaler must see.
    """
    xp = backend.xp
    return (report.status != int(Status.CONVERGED)) & ~report.fallback & xp.all(xp.isfinite(g), axis=1)


def replaced(backend: Backend, u: Array, rows: Array, how: str) -> Array:
    """`u` `(batch, n)` with zero or NaN (`how`: "zero" or "nan") in these rows `(batch,)`; works in traced code."""
    return backend.select(rows, backend.xp.full_like(u, 0.0 if how == "zero" else float("nan")), u)


def coupled_pair(backend: Backend, vjp: Map, halves: Halves, like: Array, row: int) -> tuple[int, int]:
    """Find a row in `halves` that changes when `row` does, for log₂(batch) vector–Jacobian products.

    Returns:
        The found row, and `row`.
    """
    rows = np.flatnonzero(halves.rows)
    while len(rows) > 1:
        some = np.zeros(len(halves.rows), bool)
        some[rows[: len(rows) // 2]] = True
        here = backend.to_numpy(leaks(backend, vjp, halves._replace(rows=some), like))[row] > 0
        rows = rows[: len(rows) // 2] if here else rows[len(rows) // 2 :]
    return int(rows[0]), row


def leaking_pair(backend: Backend, vjp: Map, like: Array) -> tuple[tuple[int, int] | None, Array | None, int]:
    """Find a pair of coupled rows, with halves that separate every pair of rows.

    Args:
        backend: whose arrays these are; outside of traced code.
        vjp: `u ↦ Jᵀu`.
        like: an array `(batch, n)` of the state's dtype and device.

    Returns:
        (i, j) where row i of f changes when row j of z does, what `leaks` returns for it, and the number of products
        spent, at most 3 log₂(batch). Without coupled rows the first two are None.
    """
    batch, n = like.shape
    whole, spent = random_halves(batch, n, seed=0), 0
    for rows in _groups(batch):
        leaking, spent = leaks(backend, vjp, whole._replace(rows=rows), like), spent + 1
        seen = backend.to_numpy(leaking)
        if (seen > 0).any():
            spent += max(int(rows.sum()) - 1, 0).bit_length()
            return coupled_pair(backend, vjp, whole._replace(rows=rows), like, int(np.argmax(seen))), leaking, spent
    return None, None, spent


def coupled_rows(backend: Backend, f: Map, z: Array) -> tuple[int, int] | None:
    """Find a pair of rows of which one changes when the other does, by moving rows of the state.

    The numbers of any two rows differ in some bit. Therefore all rows whose number has a given bit are moved, and all
    others are compared: 2 log₂(batch) evaluations of f cover every pair.

    Args:
        backend: whose arrays these are; eager only.
        f: the map on `(batch, n)`.
        z: where to look `(batch, n)`.

    Returns:
        (i, j): row i of f(z) changes when row j of z does. None if no row does, or if f gives different values for
        the same state, which shows nothing about its rows.
    """
    batch = z.shape[0]
    if batch < 2 or not z.shape[1]:
        return None
    base = backend.to_numpy(f(z))
    for rows in _groups(batch):
        if (changed := _changed(backend, f, z, base, rows)).size:
            if not np.array_equal(backend.to_numpy(f(z)), base, equal_nan=True):
                return None
            i = int(changed[0])
            return i, _cause(backend, f, z, base, np.flatnonzero(rows), i)
    return None


def _groups(batch: int) -> Iterator[Any]:
    """Yield two masks for each bit of a row's number: the rows that have it, and those that do not."""
    numbers = np.arange(batch)
    for bit in range(max(batch - 1, 0).bit_length()):
        having = (numbers >> bit) % 2 == 1
        yield having
        yield ~having


def _changed(backend: Backend, f: Map, z: Array, base: Any, rows: Any) -> Any:
    """Return the rows outside of `rows` whose value changes when those in `rows` move."""
    xp = backend.xp
    mask = backend.asarray(rows, like=z) > 0
    signs = backend.asarray(np.random.default_rng(0).choice([-MOVE, MOVE], z.shape[1]), like=z)
    moved = backend.select(mask, z + xp.reshape(signs, (1, -1)) * (1 + xp.abs(z)), z)
    values = backend.to_numpy(f(moved))
    sound = np.isfinite(base).all(axis=1)
    with np.errstate(all="ignore"):
        gap, size = np.linalg.norm(values - base, axis=1), np.linalg.norm(base, axis=1)
        same = gap <= LAST_BITS * backend.eps(z) * size
    return np.flatnonzero(~rows & sound & ~same)


def _cause(backend: Backend, f: Map, z: Array, base: Any, rows: Any, i: int) -> int:
    """Find one of `rows` that changes row i, by halving."""
    while len(rows) > 1:
        some = np.zeros(z.shape[0], bool)
        some[rows[: len(rows) // 2]] = True
        here = i in _changed(backend, f, z, base, some)
        rows = rows[: len(rows) // 2] if here else rows[len(rows) // 2 :]
    return int(rows[0])
