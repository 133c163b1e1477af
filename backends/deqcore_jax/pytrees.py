"""The core's results as pytrees, so that transformed functions can take and return them."""

from __future__ import annotations

from functools import cache

import jax

from deqcore.solution import Solution, SolveState


@cache
def register() -> None:
    """Register `Solution` and `SolveState` with JAX, which already knows NamedTuples (`LoopState`, `AdjointReport`)."""
    jax.tree_util.register_dataclass(
        Solution,
        data_fields=["value", "residual", "status", "steps", "evaluations", "state", "z", "fz", "aux", "mask"],
        meta_fields=["backend", "record"],
    )
    jax.tree_util.register_dataclass(SolveState, data_fields=["carry"], meta_fields=["solver"])
