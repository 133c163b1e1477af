"""Warnings and errors about samples that fail in traced code, forward and backward.

Values are known at once in eager transformations (`grad`, `vmap` outside `jit`): the warning or error comes then.
Compiled code reports by `jax.debug.callback`, inside a `lax.cond` on a few numbers, so that only a failure
calls the host. A callback has a price (`docs/notes/jax-failures.md`): the program is not kept in the persistent
compilation cache, cannot be serialised by `jax.export`, and is dispatched from Python. So compiled code holds one only
if a setting asks for it (`on_failure`, `verify_every`); the defaults compile none in. What is reported, and how often,
is decided in `deqcore.solve.traced_failures`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap

from deqcore.types import Figures


def watch(report: Callable[[Figures], None], figures: Figures, *, compiled: bool) -> None:
    """See `deqcore.abc.guards.CallGuards.watch`."""
    if not compiled and is_staged():
        return
    merged = _over_lanes(jax.tree.map(lambda x: lax.stop_gradient(jnp.asarray(x)), figures))
    if not isinstance(merged.notable(), jax.core.Tracer):
        _report_notable(report, merged)
        return
    lax.cond(merged.notable(), lambda: jax.debug.callback(_Called(report), merged), lambda: None)


def is_staged() -> bool:
    """Return whether operations are being recorded into a program, as inside `jit`, `scan` or `checkpoint`."""
    return isinstance(lax.full((), 0, np.int32), jax.core.Tracer)


class _Called:
    """A callback that is equal to itself only: JAX keeps compiled code by what it calls."""

    def __init__(self, report: Callable[[Figures], None]) -> None:
        self.report = report

    def __call__(self, figures: Figures) -> None:
        _report_notable(self.report, figures)


def _report_notable(report: Callable[[Figures], None], figures: Figures) -> None:
    on_host = jax.tree.map(np.asarray, figures)
    if on_host.notable():
        report(on_host)


@custom_vmap
def _over_lanes(figures: Figures) -> Figures:
    """Return the figures. Under vmap, join those of all lanes, for one callback instead of one per lane."""
    return figures


@_over_lanes.def_vmap
def _over_lanes_batched(size: int, in_batched: list[Figures], figures: Figures) -> tuple[Figures, Figures]:
    stacked = jax.tree.map(
        lambda x, batched: x if batched else jnp.broadcast_to(x, (size, *x.shape)), figures, in_batched[0]
    )
    merged = _over_lanes(stacked.merged(jnp))
    return merged, jax.tree.map(lambda _: False, merged)
