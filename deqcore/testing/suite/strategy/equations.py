"""Adjoint equations with known Jacobians, and a way to let a strategy solve them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from deqcore.abc.backward import Strategy
from deqcore.testing.suite.fixtures import Affine, DenseEstimate, Kit
from deqcore.types import AdjointReport, Array, Status

FLAT = -np.stack([np.eye(6)] * 3)


def cotangent(seed: int = 11) -> Any:
    """G `(3, 6)`, with a number that is exactly zero, as a loss that does not see all of z* makes many."""
    g = np.random.default_rng(seed).standard_normal((3, 6))
    g[:, 2] = 0.0
    return g


def perfect(problem: Affine) -> Any:
    """H = (A − I)^-1, `(batch, n, n)`."""
    return np.linalg.inv(problem.a - np.eye(problem.a.shape[1]))


@functools.lru_cache(maxsize=64)
def _program(kit: Kit, strategy: Strategy) -> Callable[..., Any]:
    """`solve_adjoint` as a function of g, A and H: compiled once for all problems of a shape."""

    def solved(g: Array, a: Array, *h: Array) -> Any:
        vjp = kit.vjp(a) if strategy.uses_vjp() else no_vjp
        with kit.backend.errstate():
            return strategy.solve_adjoint(kit.backend, vjp, g, DenseEstimate(kit, *h) if h else None)

    return kit.backend.harness.jit(solved)


def solve_adjoint(
    kit: Kit,
    strategy: Strategy,
    problem: Affine,
    g: Any,
    estimate: Any = None,
    dtype: str = "float64",
) -> tuple[Any, AdjointReport]:
    """`strategy.solve_adjoint` on the Jacobians of an affine problem, compiled where the backend can; NumPy in and out.

    `estimate` is H `(batch, n, n)` for a strategy that wants one, by default −I.
    """
    matrices = [g, problem.a]
    if strategy.wants_estimate():
        matrices.append(-np.stack([np.eye(g.shape[1])] * len(g)) if estimate is None else estimate)
    u, report = _program(kit, strategy)(*(kit.array(each, dtype) for each in matrices))
    assert kit.backend.dtype_name(u) == dtype, f"u is {kit.backend.dtype_name(u)} for a cotangent of {dtype}"
    assert isinstance(report, AdjointReport), (
        "solve_adjoint must return (u, AdjointReport), such as by deqcore.abc.backward.report."
    )
    result = AdjointReport(*map(kit.numpy, report))
    check_statuses(result)
    return kit.numpy(u), result


def check_statuses(report: AdjointReport) -> None:
    """Fail where a status of a report is none of `Status`."""
    unknown = sorted(set(report.status.tolist()) - {int(code) for code in Status})
    assert not unknown, f"a status must be one of deqcore.types.Status (got {unknown})"


def slow() -> Affine:
    """Make a problem with one eigenvalue of 0.98 among small ones: a small residual is not yet a small error."""
    rng = np.random.default_rng(12)
    q, _ = np.linalg.qr(rng.standard_normal((3, 6, 6)))
    return Affine(q @ np.diag([0.98, 0.3, 0.2, -0.2, 0.1, 0.0]) @ q.swapaxes(1, 2), rng.standard_normal((3, 6)))


def hidden(n: int = 16) -> tuple[Affine, Any]:
    """Make a problem and a cotangent `(3, n)` with little weight on the slow mode that dominates u.

    With less than half of this weight, the first Krylov spaces do not contain it, and no estimate of the error can.
    """
    rng = np.random.default_rng(13)
    q, _ = np.linalg.qr(rng.standard_normal((3, n, n)))
    modes = np.array([0.99, *rng.uniform(-0.4, 0.4, n - 1)])
    weights = np.array([0.5, *rng.standard_normal(n - 1)])
    return Affine(q @ np.diag(modes) @ q.swapaxes(1, 2), rng.standard_normal((3, n))), q @ weights


def unlike() -> tuple[Affine, Any]:
    """Make three samples of different difficulty: nearly flat, one slow mode with little weight in g, equal modes."""
    problem, g = hidden()
    problem.a[0] *= 0.02
    problem.a[2] = 0.9 * np.linalg.qr(np.random.default_rng(17).standard_normal((16, 16)))[0]
    return problem, g


def singular(n: int = 20) -> tuple[Affine, Any]:
    """I − J loses rank up to rounding in the middle sample; and a cotangent that is not in its range."""
    rng = np.random.default_rng(14)
    v = rng.standard_normal((3, n, n))
    modes = np.tile([0.5, *rng.uniform(-0.5, 0.5, n - 1)], (3, 1))
    modes[1, 0] = 1.0
    return Affine(v @ (modes[:, :, None] * np.linalg.inv(v)), np.zeros((3, n))), rng.standard_normal((3, n))


def no_vjp(u: Array) -> Array:
    """Refuse a product, for a strategy that says it takes none."""
    raise AssertionError("solve_adjoint called vjp, although uses_vjp() says that it does not")
