"""Warnings and errors about samples that fail in traced code, forward and backward.

Values are known at once in eager transformations (`grad`, `vmap` outside `jit`): the warning or error comes then.
Compiled code reports by `jax.debug.callback`, inside a `lax.cond` on a few numbers `(6,)`, so that only a failure
calls the host. A callback has a price (`docs/notes/jax-failures.md`): the program is not kept in the persistent
compilation cache, cannot be serialised by `jax.export`, and is dispatched from Python. So compiled code holds one only
if `on_failure` was set; the default "warn" compiles none in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from deqcore.solution import Tally
from deqcore.solve.adjoint import Adjoint
from deqcore.solve.traced_failures import Failures, Place
from deqcore.types import AdjointReport, Status

ADJOINT: Final = "after at most {steps} vjps, adjoint residual at most {residual:.3g}."
BEFORE: Final = "The adjoint solve of a backward pass failed, so the gradients of these samples are wrong.\n"
CURE: Final = (
    " Raise max_steps in backward.options, choose another backward.strategy, or set backward.on_failure = 'zero' to "
    "drop these samples from the gradient."
)


def watch(report: Failures, status: Any, steps: Any, residual: Any, *, compiled: bool) -> None:
    """See `deqcore.abc.backend.Backend.watch`."""
    if not status.size or (not compiled and is_staged()):
        return
    figures = [lax.stop_gradient(each) for each in (status, steps, residual)]
    tally = Tally(*_over_lanes(*Tally.of(jnp, *figures)))
    if not isinstance(tally.failed(), jax.core.Tracer):
        _called(report, *tally)
        return
    lax.cond(tally.failed(), lambda: jax.debug.callback(_Called(report), *tally), lambda: None)


def bound(adjoint: Adjoint) -> Adjoint:
    """The adjoint as it is compiled: a warning that was not asked for is left out of a user's compiled code."""
    silent = adjoint.on_failure == "warn" and not adjoint.asked and is_staged()
    return replace(adjoint, on_failure="ignore" if silent else adjoint.on_failure, asked=False)


def place_of(adjoint: Adjoint) -> Place | None:
    """The user's line that a callback of the adjoint solve belongs to; None where no callback is compiled in."""
    return Place.caller() if adjoint.on_failure in ("warn", "raise") else None


def checked(adjoint: Adjoint, place: Place | None, u: Any, report: AdjointReport) -> Any:
    """`u` `(batch, n)` after what `backward.on_failure` says about samples whose adjoint solve failed."""
    action = adjoint.on_failure
    if action in ("zero", "nan"):
        failed = report.status != int(Status.CONVERGED)
        return jnp.where(failed[:, None], jnp.full_like(u, 0.0 if action == "zero" else jnp.nan), u)
    if action != "ignore":
        failures = Failures(action, ADJOINT, BEFORE, CURE, place)
        watch(failures, report.status, report.vjps, report.residual, compiled=True)
    return u


def is_staged() -> bool:
    """Whether operations are recorded into a program at the moment, as inside `jit`, `scan` or `checkpoint`."""
    return isinstance(lax.full((), 0, np.int32), jax.core.Tracer)


class _Called:
    """A callback that is equal to itself only: JAX keeps compiled code by what it calls."""

    def __init__(self, report: Failures) -> None:
        self.report = report

    def __call__(self, *figures: Any) -> None:
        _called(self.report, *figures)


def _called(report: Failures, *figures: Any) -> None:
    tally = Tally(*map(np.asarray, figures))
    if tally.failed():
        report(tally)


@custom_vmap
def _over_lanes(samples: Any, steps: Any, residual: Any) -> tuple[Any, Any, Any]:
    """A tally; under vmap, that of all lanes together: one callback, not one per lane."""
    return samples, steps, residual


@_over_lanes.def_vmap
def _over_lanes_batched(size: int, in_batched: list[bool], *figures: Any) -> tuple[Any, tuple[bool, bool, bool]]:
    samples, steps, residual = (
        figure if batched else jnp.broadcast_to(figure, (size, *figure.shape))
        for figure, batched in zip(figures, in_batched, strict=True)
    )
    merged = _over_lanes(jnp.sum(samples, axis=0), jnp.max(steps, axis=0), jnp.max(residual, axis=0))
    return tuple(merged), (False, False, False)
