"""What a backward pass did: a tap carries the report of the adjoint solve out of `jax.grad` as data.

A vector–Jacobian product returns only its gradients, so the figures come back as one of them. Inside
`reporting(tap)` a solve takes the tap along, an argument of zeros. The gradient with respect to the tap *is* the
report. It passes `jit`, `vmap`, `scan` and layers, and costs nothing where you do not ask for it.

The tap also carries what `backward.verify_every` measures. Eager transformations measure the first pass of a function
and every n-th after it. Compiled code counts nothing: a hash of the gradient chooses one pass in n on average, and
`backward.verify_every = 1` measures each pass.

Rules: one tap serves one solve; make it and differentiate with respect to it inside the same `jit`; under `vmap` each
lane brings its own. A solve with a tap has reverse mode only.

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
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from deqcore.errors import StrategyError
from deqcore.types import AdjointReport
from deqcore_jax.solve_block import SolveBlock


class AdjointTap(NamedTuple):
    """An AdjointReport as floating-point numbers, each `(batch,)` of float32, with the number of reports.

    Attributes:
        status: as in AdjointReport.
        vjps: as in AdjointReport.
        residual: as in AdjointReport.
        error: as in AdjointReport.
        fallback: as in AdjointReport, 0 or 1.
        coupling: as in AdjointReport.
        verify_vjps: as in AdjointReport.
        gradient_error: as in AdjointReport.
        gradient_cosine: as in AdjointReport.
        gradient_products: as in AdjointReport.
        per_sample: as in AdjointReport, 0 or 1.
        runs: how often a backward pass reported.

    Example:
        >>> new(3)._fields[-1], new(3).runs.shape
        ('runs', (3,))
    """

    status: jax.Array
    vjps: jax.Array
    residual: jax.Array
    error: jax.Array
    fallback: jax.Array
    coupling: jax.Array
    verify_vjps: jax.Array
    gradient_error: jax.Array
    gradient_cosine: jax.Array
    gradient_products: jax.Array
    per_sample: jax.Array
    runs: jax.Array


_taps: Final = SolveBlock[AdjointTap](
    "deqcore_jax.adjoint_tap",
    "A second solve runs inside one `reporting` block: give each solve an adjoint_tap of its own.",
)


def new(batch: int | tuple[int, int]) -> AdjointTap:
    """Return an adjoint tap for a solve with `batch` samples (1 if `forward.batch = false`).

    Args:
        batch: their number; `(batch, units)` with `forward.batch = 2`.

    Returns:
        Zeros `(batch,)` or `(batch, units)` of float32 in each field.

    Example:
        >>> new(2).vjps.tolist()
        [0.0, 0.0]
    """
    return AdjointTap(*[jnp.zeros(batch, jnp.float32)] * len(AdjointTap._fields))


@contextmanager
def reporting(adjoint_tap: AdjointTap) -> Iterator[None]:
    """Let the one solve inside the block report its backward pass as the gradient of `adjoint_tap`.

    Args:
        adjoint_tap: the argument to differentiate with respect to, as in the example of this module.

    Raises:
        StrategyError: a second solve runs inside the block, or the adjoint tap is for another batch.

    Example:
        >>> import deqcore
        >>> def loss(figures, x):
        ...     with reporting(figures):
        ...         return deqcore.fixed_point(lambda z, x: 0.5 * z + x, 0 * x, x).value.sum()
        >>> print(read(jax.grad(loss)(new(2), jnp.ones((2, 3)))).status)
        [1 1]
    """
    with _taps.holding(adjoint_tap):
        yield


def read(figures: AdjointTap) -> AdjointReport:
    """Return the report in a gradient with respect to an adjoint tap.

    Args:
        figures: the gradient from `jax.grad` with respect to the adjoint tap.

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
                f"An adjoint tap must receive one report per sample (got {fewest:g} to {most:g}). Differentiate a "
                f"value that depends on a solve inside `reporting`, with one adjoint tap per solve and lane of vmap."
            )
    return AdjointReport(
        status=figures.status.astype(jnp.int32),
        vjps=figures.vjps.astype(jnp.int32),
        residual=figures.residual,
        error=figures.error,
        fallback=figures.fallback > 0,
        coupling=figures.coupling,
        verify_vjps=figures.verify_vjps.astype(jnp.int32),
        gradient_error=figures.gradient_error,
        gradient_cosine=figures.gradient_cosine,
        gradient_products=figures.gradient_products.astype(jnp.int32),
        per_sample=figures.per_sample > 0,
    )


def take(batch: int) -> AdjointTap | None:
    """Return the adjoint tap of the block for the solve that starts now. Only `deqcore_jax.backend` calls it."""
    adjoint_tap = _taps.take()
    if adjoint_tap is not None and adjoint_tap.runs.size != batch:
        raise StrategyError(
            f"The adjoint tap must have one entry for each of the {batch} samples or units of the solve (got "
            f"the shape {adjoint_tap.runs.shape}). Make it with deqcore_jax.adjoint_tap.new({batch}), or with "
            f"new((batch, units)) for forward.batch = 2."
        )
    return adjoint_tap


def fill(report: AdjointReport, shape: tuple[int, ...]) -> AdjointTap:
    """Return a report as the cotangent of an adjoint tap of this shape."""
    unmeasured, nothing = jnp.full_like(report.residual, jnp.nan), jnp.zeros_like(report.vjps)
    counts = ("verify_vjps", "gradient_products", "per_sample")
    numbers = [
        (nothing if name in counts else unmeasured) if leaf is None else leaf
        for name, leaf in zip(AdjointReport._fields, report, strict=True)
    ]
    every = (*numbers, jnp.ones_like(report.vjps))
    return AdjointTap(*[jnp.asarray(figure).astype(jnp.float32).reshape(shape) for figure in every])
