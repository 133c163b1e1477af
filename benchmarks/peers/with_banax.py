"""banax (Python 3.12 and later): solvers of one state with a relative stopping rule."""

from __future__ import annotations

from typing import Any

from banax import solver as solvers
from banax.adjoint import JFB

from benchmarks.peers.per_sample import PerSample


class Banax(PerSample):
    """One of its solvers under vmap."""

    library = "banax"

    def __init__(self, solver: str, **settings: Any) -> None:
        self.solver = solver.lower()
        self.make = getattr(solvers, solver)
        self.settings = settings

    def one(self, f: Any, z0: Any, rtol: float, max_steps: int) -> tuple[Any, Any]:
        result = JFB(solver=self.make(rtol=rtol, max_steps=max_steps, **self.settings))(f, z0)
        return result.value, result.stats.steps


CONTENDERS = [Banax("Anderson"), Banax("Broyden", history_size=50)]
