"""anchorax: solvers of one sample with a relative stopping rule; a batch goes through vmap."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
from anchorax import solvers

from deqcore.bench.harness import Contender, Harness, Outcome, Ready, Solve
from deqcore.testing.problem import rebuild


class Anchorax(Contender):
    """One of its solvers under vmap."""

    library = "anchorax"
    recompiles = True

    def __init__(self, solver: str, **settings: Any) -> None:
        self.solver = solver
        self.function = getattr(solvers, solver)
        self.settings = settings

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> Solve:
        def single(rtol: float, z0: Any, params: Any, inputs: Any) -> Any:
            one = rebuild(inputs, lambda a: a[None])

            def f(u: Any, _: Any, *, inference: bool = False, key: Any = None) -> Any:
                del inference, key
                return ready.f(u[None], params, one)[0]

            value, _, steps = self.function(
                None,
                f,
                z0,
                u0=z0,
                eps=rtol,
                max_depth=max(1, max_steps),
                stop_mode="rel",
                key=jax.random.PRNGKey(0),
                **self.settings,
            )
            return value, steps

        @cache  # its tolerance is static: each compiles again
        def compiled(rtol: float) -> Any:
            return jax.jit(jax.vmap(partial(single, rtol), in_axes=(0, None, 0)))

        def run(rtol: float) -> Outcome:
            value, steps = compiled(rtol)(ready.z0, ready.params, ready.inputs)
            harness.block(value)
            return Outcome(value, int(steps.max()))

        return run


CONTENDERS = [
    Anchorax("picard"),
    Anchorax("anderson", window_size=5),
    Anchorax("broyden", LBFGS_thres=50),
]
