"""Known failures: solver × golden problem × backend × dtype, where a healthy sample is not solved.

`python -m deqcore.testing.known_failures numpy torch jax > docs/conformance/known-failures.md` writes the published
table; a test holds it to what happens. A solver that bounds its cost on a problem (`Solver.cost_bounds`) is no longer
excused from it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

import deqcore
from deqcore import plugins
from deqcore.plugins.builtin import SOLVERS
from deqcore.testing.problems import golden, names
from deqcore.testing.suite.fixtures import Kit
from deqcore.testing.tolerances import tolerance
from deqcore.types import Status

MAX_STEPS: Final = 300
TOO_SLOW: Final = "STALLED or MAX_STEPS"  # which of the two is a matter of rounding, and so of the machine
DTYPES: Final = ("float64", "float32")
HEADER: Final = """# What is known to fail

Golden problems that a built-in solver does not solve within {steps} steps to what the dtype can reach (1e-12 in
float64, a few units in the last place in float32). Samples without a solution (one in `divergent`, one in `nan`) are
left out: there every solver must say that it failed. The suite demands an honest status in all of these cases, and
convergence in all others. Written by `python -m deqcore.testing.known_failures`; a test keeps it true.

| solver | problem | backend | dtype | how its healthy samples end | why |
|---|---|---|---|---|---|
"""
WHY: Final = {
    "picard": {
        "slow-modes": "ρ(J) = 0.99: plain iteration needs some 2,700 steps",
        "": "plain iteration does not contract here",
    },
    "": {
        "ill-conditioned": "condition 1e4 at the edge of what contracts; no secant method is asked to",
        "walled": "shortened steps creep along the edge of where f has numbers; `broyden` or `anderson` solve it",
    },
}
ENDED: Final = {int(Status.STALLED): TOO_SLOW, int(Status.MAX_STEPS): TOO_SLOW}


class Failure(NamedTuple):
    """One row of the table."""

    solver: str
    problem: str
    backend: str
    dtype: str
    ended: str
    why: str


def failures(backends: Sequence[str], solvers: Sequence[str] | None = None) -> Iterator[Failure]:
    """Run these solvers, default all that are built in, on every golden problem."""
    for name in backends:
        kit = Kit(deqcore.get_backend(backend=name))
        with kit.backend.harness.high_precision():
            for solver in [spec.name for spec in SOLVERS] if solvers is None else solvers:
                for problem in names():
                    for dtype in DTYPES:
                        yield from _one(kit, solver, problem, dtype)


def _one(kit: Kit, solver: str, problem: str, dtype: str) -> Iterator[Failure]:
    available = golden(problem)
    rtol = tolerance(float(np.finfo(dtype).eps), available.truth.jacobian.shape[1])
    f, z0, args = kit.data(available, dtype)
    with np.errstate(all="ignore"):
        sol = kit.solve(f, z0, *args, solver=solver, rtol=rtol, max_steps=MAX_STEPS)
    yield from failure(solver, problem, kit.backend.name, dtype, kit.numpy(sol.status))


def failure(solver: str, problem: str, backend: str, dtype: str, statuses: Any) -> Iterator[Failure]:
    """Yield the row of a solve with these statuses `(batch,)`, unless all healthy samples are solved."""
    status = statuses[golden(problem).truth.healthy]
    ended = sorted({ENDED.get(int(code), Status(int(code)).name) for code in status if code != int(Status.CONVERGED)})
    if ended:
        reasons = {**WHY[""], **WHY.get(solver, {})}
        why = reasons.get(problem, reasons.get("", "not looked into"))
        yield Failure(solver, problem, backend, dtype, ", ".join(ended), why)


def table(backends: Sequence[str]) -> str:
    """Return the page."""
    rows = sorted(failures(backends))
    return HEADER.format(steps=MAX_STEPS) + "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    for item in sys.argv[1:]:
        plugins.spec("backend", item)
    sys.stdout.write(table(sys.argv[1:]))
