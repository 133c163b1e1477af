"""The core's results as pytrees, so that they pass in and out of transformed functions."""

from __future__ import annotations

from functools import cache

import jax

from deqcore.solution import Solution, SolveState


@cache
def register() -> None:
    """Tell JAX about `Solution` and `SolveState`; NamedTuples (`LoopState`, `AdjointReport`) it knows."""
    jax.tree_util.register_dataclass(
        Solution,
        data_fields=["value", "residual", "status", "steps", "evaluations", "state", "z", "fz"],
        meta_fields=["backend", "record"],
    )
    jax.tree_util.register_dataclass(SolveState, data_fields=["carry"], meta_fields=["solver"])
