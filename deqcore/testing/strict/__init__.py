"""The strict NumPy backend: it refuses what a tracing framework cannot do, with a message that says what to do instead.

A solver or a strategy that passes here traces under `jax.jit` without edits, and its author needs no JAX to find out.
"""

from __future__ import annotations

from typing import Final

from deqcore import plugins
from deqcore.testing.strict.array import StrictError

__all__ = ["NAME", "StrictError", "register"]

NAME: Final = "strict"


def register() -> None:
    """Make `backend = "strict"` known in this process.

    Example:
        >>> import numpy as np, deqcore
        >>> register()
        >>> be = deqcore.get_backend(backend="strict")
        >>> try:
        ...     bool(be.xp.sum(be.asarray(np.ones(2))) > 1)
        ... except StrictError:
        ...     print("refused: a traced number has no truth value")
        refused: a traced number has no truth value
    """
    target = "deqcore.testing.strict.backend:StrictBackend"
    summary = "NumPy that refuses what tracing refuses; for tests"
    plugins.register(plugins.BackendSpec(NAME, target, summary, array_modules=("deqcore",)))
