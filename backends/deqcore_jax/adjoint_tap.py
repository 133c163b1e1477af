"""What a backward pass did: a adjoint_tap carries the report of the adjoint out of `jax.grad` as data.

A vector–Jacobian product has no return path beside its gradients. So the figures come back as one: inside
`reporting(adjoint_tap)` a solve takes the adjoint_tap, an argument of zeros, along, and the gradient with respect to the adjoint_tap *is*
the report. It passes `jit`, `vmap`, `scan` and layers, and costs nothing where it is not asked for.

Rules: one adjoint_tap serves one solve; make it and differentiate with respect to it inside the same `jit`; under `vmap`
each lane brings its own. A probed solve has reverse mode only.

Example:
    >>> import jax, jax.numpy as jnp, deqcore, deqcore_jax.adjoint_tap
    >>> def loss(a, adjoint_tap):
    ...     with deqcore_jax.adjoint_tap.reporting(adjoint_tap):
    ...         z = deqcore.fixed_point(lambda z: a * z + 1.0, jnp.zeros((2, 1))).value
    ...     return jnp.sum(z)
    >>> gradient, figures = jax.grad(loss, argnums=(0, 1))(0.5, deqcore_jax.adjoint_tap.new(2))
    >>> report = deqcore_jax.adjoint_tap.read(figures)
    >>> report.status.tolist(), report.vjps.tolist()  # 1 is CONVERGED
    ([1, 1], [1, 1])
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deqcore.errors import StrategyError
from deqcore.types import AdjointReport
from deqcore_jax.jit_context import key


class AdjointTap(NamedTuple):
    """An AdjointReport in floating-point numbers, each `(batch,)` of float32, and how often it was filled in.

    Attributes:
        status: as in AdjointReport.
        vjps: likewise.
        residual: likewise.
        error: likewise.
        fallback: likewise, 0 or 1.
        runs: how often a backward pass reported.

    Example:
        >>> new(3)._fields[-1], new(3).runs.shape
        ('runs', (3,))
    """

    status: Any
    vjps: Any
    residual: Any
    error: Any
    fallback: Any
    runs: Any


class _Slot:
    """The adjoint_tap of a `reporting` block, and whether a solve has taken it."""

    def __init__(self, adjoint_tap: AdjointTap) -> None:
        self.adjoint_tap = adjoint_tap
        self.taken = False


_open: ContextVar[_Slot | None] = ContextVar("deqcore_jax.adjoint_tap", default=None)


def new(batch: int) -> AdjointTap:
    """A adjoint_tap for a solve with `batch` samples (1 if `forward.batch = false`).

    Returns:
        Zeros `(batch,)` of float32 in each field.

    Example:
        >>> new(2).vjps.tolist()
        [0.0, 0.0]
    """
    return AdjointTap(*[jnp.zeros(batch, jnp.float32)] * len(AdjointTap._fields))


@contextmanager
def reporting(adjoint_tap: AdjointTap) -> Iterator[None]:
    """Let the one solve inside the block report its backward pass as the gradient of `adjoint_tap`.

    Args:
        adjoint_tap: what is differentiated with respect to, as in the example of this module.

    Raises:
        StrategyError: a second solve runs inside the block, or the adjoint_tap is for another batch.

    Example:
        >>> import deqcore
        >>> def loss(figures, x):
        ...     with reporting(figures):
        ...         return deqcore.fixed_point(lambda z, x: 0.5 * z + x, 0 * x, x).value.sum()
        >>> print(read(jax.grad(loss)(new(2), jnp.ones((2, 3)))).status)
        [1 1]
    """
    slot = _Slot(adjoint_tap)
    token = _open.set(slot)
    try:
        with key(slot):  # a function compiled inside the block holds this adjoint_tap, and no other may use it
            yield
    finally:
        _open.reset(token)


def read(figures: AdjointTap) -> AdjointReport:
    """The report in a gradient with respect to a adjoint_tap.

    Args:
        figures: what `jax.grad` returned for the adjoint_tap.

    Returns:
        The report, `(batch,)` in each field.

    Raises:
        StrategyError: (outside compiled code) no backward pass reported, or several added up.

    Example:
        >>> read(new(2)._replace(runs=jnp.ones(2), vjps=jnp.full(2, 3.0))).vjps.tolist()
        [3, 3]
    """
    runs = figures.runs
    if not isinstance(runs, jax.core.Tracer) and runs.size:
        fewest, most = float(runs.min()), float(runs.max())
        if fewest != 1.0 or most != 1.0:
            raise StrategyError(
                f"The adjoint_tap was reported to between {fewest:g} and {most:g} times per sample, but once is expected: "
                f"differentiate a value that depends on a solve inside `reporting`, with one adjoint_tap per solve and per "
                f"lane of vmap."
            )
    return AdjointReport(
        status=figures.status.astype(jnp.int32),
        vjps=figures.vjps.astype(jnp.int32),
        residual=figures.residual,
        error=figures.error,
        fallback=figures.fallback > 0,
        coupling=jnp.full_like(figures.residual, jnp.nan),
        verify_vjps=jnp.zeros_like(figures.status, jnp.int32),
    )


def take(batch: int) -> AdjointTap | None:
    """The adjoint_tap for the solve that starts now, if one waits. Only `deqcore_jax.backend` calls it."""
    slot = _open.get()
    if slot is None:
        return None
    if slot.taken:
        raise StrategyError(
            "A second solve runs inside one `reporting` block: give each solve a adjoint_tap of its own."
        )
    if slot.adjoint_tap.runs.shape != (batch,):
        raise StrategyError(
            f"The adjoint_tap has shape {slot.adjoint_tap.runs.shape}, but the solve has {batch} samples: make it with "
            f"deqcore_jax.adjoint_tap.new({batch})."
        )
    slot.taken = True
    return slot.adjoint_tap


def fill(report: AdjointReport) -> AdjointTap:
    """A report as the cotangent of a adjoint_tap."""
    numbers = [jnp.asarray(each).astype(jnp.float32) for each in report[:5]]
    status, vjps, residual, error, fallback = numbers
    return AdjointTap(status, vjps, residual, error, fallback, jnp.ones_like(status))
