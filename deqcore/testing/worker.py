"""One framework in its own process: `python -m deqcore.testing.worker FOLDER`.

Reads `jobs.json` from the folder and writes `results.json` (how each job ended) and `results.npz` (its arrays, under
`number|quantity`). Frameworks never meet in one process: each has its own threads, allocator and global switches.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from deqcore import plugins
from deqcore.abc.backend import Backend
from deqcore.abc.backward import StepStrategy
from deqcore.abc.solver import Solver
from deqcore.api import get_backend, vjp
from deqcore.config import Config
from deqcore.errors import DeqcoreError, ProblemError
from deqcore.solve.failures import coupling
from deqcore.solve.flatten import RavelSpec
from deqcore.solve.verification import coupled_rows
from deqcore.testing.problem import Problem, load_problem, place, rebuild, walk
from deqcore.testing.problems import FUNCTIONS, golden
from deqcore.types import Array, Tree

SKIPPED: Final = "skipped: "


@dataclass(frozen=True)
class Job:
    """One solve with its gradients, or the dense reference of a problem.

    Attributes:
        kind: "solve"; "dense", for z* and gradients by dense linear algebra.
        problem: name of a golden problem, or `path/to/file.py:name`.
        dtype: of the arithmetic.
        data: dtype that the data are rounded to first (what a run in that dtype would see).
        jitter: seed of a change of all data by one unit in the last place; 0 for none.
    """

    kind: str
    problem: str
    dtype: str
    solver: str = "broyden"
    strategy: str = "exact-ift"
    solver_options: Mapping[str, object] = field(default_factory=dict)
    strategy_options: Mapping[str, object] = field(default_factory=dict)
    rtol: float = 0.0
    max_steps: int = 0
    data: str = ""
    jitter: int = 0

    @property
    def key(self) -> str:
        """The same for the same work."""
        return json.dumps(asdict(self), sort_keys=True)

    def config(self, backend: str, batch: bool) -> Config:
        """Complete settings, so that no environment variable has a say."""
        return Config(
            backend=backend,
            forward={
                "solver": self.solver,
                "options": self.solver_options,
                "rtol": self.rtol,
                "max_steps": self.max_steps,
                "batch": batch,
                "on_failure": "raise" if self.rtol else "ignore",
            },
            backward={"strategy": self.strategy, "options": self.strategy_options, "on_failure": "ignore"},
        )


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


def data_of(problem: Problem, job: Job, backend: Backend) -> tuple[Tree, Tree, Tree, Tree]:
    """Return the parameters, inputs, z0 and cotangent as arrays of the backend."""
    rng = np.random.default_rng(job.jitter)

    def convert(leaf: Any) -> Array:
        host = np.asarray(leaf)
        if np.issubdtype(host.dtype, np.floating):
            host = host.astype(job.data or job.dtype)
            if job.jitter:
                signs = rng.integers(-1, 2, host.shape).astype(host.dtype)
                host = (host * (1 + np.finfo(host.dtype).eps * signs)).astype(host.dtype)
            host = host.astype(job.dtype)
        return backend.asarray(host)

    trees = (problem.params, problem.inputs, problem.z0, problem.direction())
    params, inputs, z0, g = (rebuild(tree, convert) for tree in trees)
    return params, inputs, z0, g


def shifted(backend: Backend, f: Callable[..., Tree]) -> Callable[..., Tree]:
    """f(z, params, inputs) + shift, so that the gradient for the shift is u = (I − J)^-T g itself."""

    def moved(z: Tree, params: Tree, inputs: Tree, shift: Tree) -> Tree:
        out = f(z, params, inputs)
        leaves, structure = backend.flatten(out)
        shifts, expected = backend.flatten(shift)
        if structure != expected or any(not backend.is_array(leaf) for leaf in leaves):
            return out  # the solve itself raises a better message
        if any(tuple(a.shape) != tuple(b.shape) for a, b in zip(leaves, shifts, strict=True)):
            return out
        return backend.unflatten(structure, [a + b for a, b in zip(leaves, shifts, strict=True)])

    return moved


def solve(backend: Backend, problem: Problem, job: Job, f: Callable[..., Tree]) -> dict[str, Any]:
    """z* and all gradients by deqcore."""
    params, inputs, z0, g = data_of(problem, job, backend)
    zero = rebuild(z0, lambda leaf: 0 * leaf)
    moved = shifted(backend, f)
    config = job.config(backend.name, problem.batch)
    z, gradients = vjp(moved, z0, params, inputs, zero, cotangent=g, config=config)
    at_start = f(z0, params, inputs)
    named = [*walk(at_start, "f(z0)"), *walk(z, "z"), *walk(gradients[2], "cotangent")]
    named += [*walk(gradients[0], "params"), *walk(gradients[1], "inputs")]
    return {name: backend.to_numpy(leaf) for name, leaf in named if leaf is not None}


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
        raise RuntimeError(f"{SKIPPED}differences through inner solves take too long without autodiff")
    try:
        if job.kind == "dense":
            from deqcore.testing.dense import dense

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
