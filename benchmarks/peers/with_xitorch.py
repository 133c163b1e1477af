"""xitorch: one tolerance on the norm of f(z) − z over the batch; broyden1 takes the batch for one system."""

from __future__ import annotations

import warnings

from xitorch.optimize import equilibrium

from deqcore.bench.harness import Contender, Harness, Ready, SolveFunction, SolveOutcome


class Xitorch(Contender):
    """`equilibrium` with one of its methods."""

    library = "xitorch"

    def __init__(self, solver: str, *, batched: bool = False) -> None:
        self.solver = solver
        self.batched = batched

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        size = ready.z0.numel() ** 0.5
        settings = {"feat_ndims": ready.z0.dim() - 1} if self.batched else {}

        def run(rtol: float) -> SolveOutcome:
            with harness.quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = equilibrium(
                    lambda z: ready.f(z, ready.params, ready.inputs),
                    ready.z0,
                    method=self.solver,
                    maxiter=max_steps,
                    f_tol=rtol * size,
                    x_tol=float("inf"),  # or it continues until the step is below 1e-6 too
                    verbose=False,
                    **settings,
                )
            harness.block(value)
            return SolveOutcome(value)

        return run


CONTENDERS = [Xitorch("broyden1"), Xitorch("anderson_acc", batched=True)]
