"""xitorch: the whole batch is one system, with one tolerance on the norm of f(z) − z."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from xitorch.optimize import equilibrium

from deqcore.bench.harness import Contender, Harness, Outcome, Ready


class Xitorch(Contender):
    """`equilibrium` with one of its methods."""

    library = "xitorch"

    def __init__(self, solver: str) -> None:
        self.solver = solver

    def prepare(self, harness: Harness, ready: Ready, rtol: float, max_steps: int) -> Callable[[], Outcome]:
        size = ready.z0.numel() ** 0.5

        def run() -> Outcome:
            with harness.quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = equilibrium(
                    lambda z: ready.f(z, ready.params, ready.inputs),
                    ready.z0,
                    method=self.solver,
                    maxiter=max_steps,
                    f_tol=rtol * size,
                    verbose=False,
                )
            harness.block(value)
            return Outcome(value)

        return run


CONTENDERS = [Xitorch("broyden1"), Xitorch("anderson_acc")]
