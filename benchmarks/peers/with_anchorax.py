"""anchorax: solvers of one sample with a relative stopping rule."""

from __future__ import annotations

from typing import Any

import jax
from anchorax import solvers

from benchmarks.peers.per_sample import PerSample


class Anchorax(PerSample):
    """One of its solvers under vmap."""

    library = "anchorax"

    def __init__(self, solver: str, **settings: Any) -> None:
        self.solver = solver
        self.function = getattr(solvers, solver)
        self.settings = settings

    def one(self, f: Any, z0: Any, rtol: float, max_steps: int) -> tuple[Any, Any]:
        value, _, steps = self.function(
            None,
            lambda u, _, **_settings: f(u),
            z0,
            u0=z0,
            eps=rtol,
            max_depth=max_steps,
            stop_mode="rel",
            key=jax.random.PRNGKey(0),
            **self.settings,
        )
        return value, steps


CONTENDERS = [
    Anchorax("picard"),
    Anchorax("anderson", window_size=5),
    Anchorax("broyden", LBFGS_thres=50),
]
