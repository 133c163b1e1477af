"""Settings that compiled code depends on, as part of `jax.jit`'s cache key; and the precision of products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Final

import jax

_settings: Final = jax.make_user_context()
_probes: Final = jax.make_user_context()

_outer: ContextVar[str | None] = ContextVar("deqcore_jax.precision", default=None)


def settings(config: object) -> AbstractContextManager[object]:
    """Enter settings, so that functions compiled under other settings are compiled again. `deqcore.using` calls it."""
    return _settings(config)


def key(value: object) -> AbstractContextManager[object]:
    """Enter a block whose compiled functions belong to `value`."""
    return _probes(value)


@contextmanager
def precise() -> Iterator[None]:
    """Compute products of coefficients in full precision: GPUs and TPUs shorten float32 by default.

    f is not affected, because it was traced outside.
    """
    token = _outer.set(jax.config.jax_default_matmul_precision)
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        _outer.reset(token)


@contextmanager
def as_outside() -> Iterator[None]:
    """Restore the precision that the user chose, for derivatives of f inside `precise`."""
    with jax.default_matmul_precision(_outer.get()):
        yield
