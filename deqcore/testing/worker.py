"""One framework in its own process: `python -m deqcore.testing.worker FOLDER`.

Reads `jobs.json` from the folder and writes `results.json` (how each job ended) and `results.npz` (its arrays, under
`number|quantity`). Frameworks never meet in one process: each has its own threads, allocator and global switches.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from deqcore import plugins
from deqcore.abc.backend import Backend
from deqcore.abc.backward import StepStrategy
from deqcore.abc.solver import Solver
from deqcore.api import get_backend
from deqcore.config import Config
from deqcore.errors import DeqcoreError, ProblemError
from deqcore.solve.flatten import RavelSpec
from deqcore.solve.messages import coupling
from deqcore.solve.verification import coupled_rows
from deqcore.testing.dense import dense
from deqcore.testing.jobs import Job, data_of, solve
from deqcore.testing.problem import Problem, load_problem, place
from deqcore.testing.problems import FUNCTIONS, golden
from deqcore.types import Tree

SKIPPED: Final = "skipped: "


class _Watched:
    """f, with a memory of what it raised last: an error of the user's function is reported as such."""

    def __init__(self, f: Callable[..., Tree]) -> None:
        self.f = f
        self.raised: BaseException | None = None

    def __call__(self, *args: Any) -> Tree:
        try:
            return self.f(*args)
        except Exception as error:
            self.raised = error
            raise


def _refuse_coupling(backend: Backend, problem: Problem, job: Job, f: Callable[..., Tree]) -> None:
    """Raise if f couples rows: such rows are not samples, and no strategy can be right.

    Raises:
        ProblemError: naming two of them.
    """
    params, inputs, z0, _ = data_of(problem, job, backend)
    space = RavelSpec.of(backend, z0, problem.batch)
    raveled = space.wrap(f)
    with backend.errstate():
        pair = coupled_rows(backend, lambda z: backend.detach(raveled(z, params, inputs)), space.ravel(z0))
    if pair is not None:
        raise ProblemError(coupling(pair))


def too_slow(backend: Backend, job: Job) -> bool:
    """Return whether each number of the data would cost a run of a solver that solves in each of its steps."""
    strategy = plugins.make_strategy(job.strategy, job.strategy_options)
    recorded = isinstance(strategy, StepStrategy) and not strategy.solves()
    nested = solves_inside(plugins.make_solver(job.solver, job.solver_options))
    return recorded and nested and not backend.capabilities.autodiff


def solves_inside(solver: Solver) -> bool:
    """Return whether a step takes a varying number of evaluations, because it solves something itself."""
    return type(solver).evaluations is not Solver.evaluations


def run(backend: Backend, job: Job) -> dict[str, Any]:
    """Return the arrays of one job.

    Raises:
        RuntimeError: the user's f raised; the message says where.
    """
    problem = golden(job.problem).problem if job.problem in FUNCTIONS else load_problem(job.problem)
    f = _Watched(problem.bound(backend))
    if too_slow(backend, job):
        raise RuntimeError(f"{SKIPPED}differences through inner solves take too long without autodiff.")
    try:
        if job.kind == "dense":
            return dense(backend, problem, job, f)
        _refuse_coupling(backend, problem, job, f)
        return solve(backend, problem, job, f)
    except Exception as error:
        if f.raised is not None and error is f.raised:
            raise RuntimeError(f"f raised {place(error)}") from error
        raise


def main(folder: Path) -> None:
    """Run all jobs in the folder; one that fails does not stop the others."""
    with suppress(DeqcoreError):  # the parent process has reported what is wrong with the project
        Config.discover()
    task = json.loads((folder / "jobs.json").read_text())
    reports: list[dict[str, object]] = []
    arrays: dict[str, Any] = {}
    backend = get_backend(Config(backend=task["backend"]))
    for number, fields in enumerate(task["jobs"]):
        start = time.perf_counter()
        report: dict[str, object] = {"error": ""}
        try:
            result = run(backend, Job(**fields))
            arrays |= {f"{number}|{name}": value for name, value in result.items()}
        except Exception as error:
            report["error"] = str(error) if isinstance(error, RuntimeError) else place(error)
        reports.append(report | {"seconds": time.perf_counter() - start})
    np.savez(folder / "results.npz", **arrays)
    (folder / "results.json").write_text(json.dumps(reports))


def write(folder: Path, backend: str, jobs: list[Job]) -> None:
    """Put the jobs of one process into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps({"backend": backend, "jobs": [asdict(job) for job in jobs]}))


def read(folder: Path) -> list[tuple[str, float, dict[str, Any]]]:
    """Return the error, seconds and arrays of each job in a folder."""
    reports = json.loads((folder / "results.json").read_text())
    results: list[tuple[str, float, dict[str, Any]]] = [(report["error"], report["seconds"], {}) for report in reports]
    with np.load(folder / "results.npz") as stored:
        for key in stored.files:
            number, _, name = key.partition("|")
            results[int(number)][2][name] = stored[key]
    return results


if __name__ == "__main__":
    main(Path(sys.argv[1]))
