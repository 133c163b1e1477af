"""Settings that compiled code depends on, as part of `jax.jit`'s cache key; and the precision of products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Final

import jax

# JAX before 0.7 has no such key, so functions compiled under one setting keep it.
_make = getattr(jax, "make_user_context", None)
_settings: Final = _make() if _make else None
_probes: Final = _make() if _make else None

_outer: ContextVar[Any] = ContextVar("deqcore_jax.precision", default=None)


def settings(config: object) -> AbstractContextManager[Any]:
    """Enter settings, so that functions compiled under other settings are compiled again. `deqcore.using` calls it."""
    return nullcontext() if _settings is None else _settings(config)


def key(value: object) -> AbstractContextManager[Any]:
    """Enter a block whose compiled functions belong to `value`."""
    return nullcontext() if _probes is None else _probes(value)


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
