"""`deqcore check gradients`: every backend × solver × strategy on golden problems, or on a user's own.

Exact strategies are held to the truth, within a bound from tolerance, dtype and the condition of I − J. Approximate
ones have no truth: after a fixed number of steps they are the same algorithm everywhere, so frameworks must agree.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from deqcore import plugins
from deqcore.abc.backward import StepStrategy, Strategy
from deqcore.abc.solver import Solver
from deqcore.errors import BackendError
from deqcore.testing import worker
from deqcore.testing.gradients.compare import Comparison, differ, quantities, size
from deqcore.testing.jobs import Job
from deqcore.testing.problem import walk
from deqcore.testing.problems import Golden, golden, unraveled
from deqcore.testing.runner.processes import WorkerTask, installed, run_all
from deqcore.testing.tolerances import tolerance

EVERY_SOLVER: Final = ("mlp", "tree")
ONE_SOLVER: Final = ("affine", "conv", "ring")  # of each exact strategy: their point is f, not the solver
FIXED_PROBLEM: Final = "ring"
FIXED_STEPS: Final = 10
FEW_STEPS: Final = 3  # of a method that solves in each step: after ten it is at rounding, and differentiates noise
SAME: Final = 1e-7  # what frameworks may differ by after a fixed number of float64 steps, relative
MAX_STEPS: Final = 500
ADJOINT_STEPS: Final = 40  # GMRES ends within a sample's number of elements; tracing frameworks allocate all of them
JITTERS: Final = (1, 2, 3)
SPREAD: Final = 10.0  # float32: times what changing the data by one unit in the last place does, at least that unit


@dataclass(frozen=True)
class GradientRun:
    """One job on one backend, and its result."""

    backend: str
    job: Job
    error: str
    seconds: float
    arrays: Mapping[str, Any]

    @property
    def skipped(self) -> bool:
        """Whether the backend left the job out on purpose."""
        return self.error.startswith(worker.SKIPPED)


@dataclass(frozen=True)
class GradientReport:
    """Everything that was run and compared."""

    runs: Sequence[GradientRun]
    comparisons: Sequence[Comparison]
    spread: Mapping[str, float]

    @property
    def errors(self) -> list[GradientRun]:
        """Runs that ended with an error."""
        return [run for run in self.runs if run.error and not run.skipped]

    @property
    def ok(self) -> bool:
        """Whether anything was compared, every run ended and every comparison is within its bound."""
        return bool(self.comparisons) and not self.errors and all(comparison.ok for comparison in self.comparisons)


def check(
    backends: Sequence[str] = (),
    solvers: Sequence[str] = (),
    strategies: Sequence[str] = (),
    dtypes: Sequence[str] = ("float64", "float32"),
    tell: Callable[[str], None] = lambda _: None,
) -> GradientReport:
    """Run the check on the golden problems.

    Args:
        backends: names; default: all that are installed.
        solvers: names; default: all registered.
        strategies: names; default: all registered.
        dtypes: names.
        tell: called with lines about progress.

    Raises:
        UnknownNameError: a name is not registered.
        MissingFrameworkError: the framework of a named backend is not installed.
    """
    chosen = installed(backends)
    pairs = list(combinations(solvers or tuple(plugins.solvers()), strategies or tuple(plugins.strategies())))
    if not pairs:
        raise BackendError("No selected solver keeps the estimate that the strategy needs. Add 'broyden'.")
    jobs: dict[tuple[str, str], list[Job]] = {}
    for dtype in dtypes:
        for backend in chosen:
            jobs[backend, dtype] = list(plan(pairs, dtype))
        reference = reference_of(chosen)
        jobs.setdefault((reference, dtype), []).extend(jittered(pairs, dtype))
        if reference not in chosen:
            jobs[reference, dtype].extend(job for job in plan(pairs, dtype) if not is_exact(job.strategy))
    runs = execute(jobs, tell)
    return GradientReport(runs, list(judge(runs, chosen)), spreads(runs))


def combinations(solvers: Iterable[str], strategies: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the solvers and strategies that fit together.

    Raises:
        UnknownNameError: a name is not registered.
    """
    for solver in solvers:
        cls = plugins.load("solver", solver)
        has_estimate = isinstance(cls, type) and issubclass(cls, Solver) and cls.has_estimate
        yield from ((solver, name) for name in strategies if has_estimate or not needs_estimate(name))


def is_exact(strategy: str) -> bool:
    """Return whether a strategy promises the true gradient."""
    cls = plugins.load("strategy", strategy)
    return isinstance(cls, type) and issubclass(cls, Strategy) and cls.exact


def needs_estimate(strategy: str) -> bool:
    """Return whether a strategy works with the solver's estimate by default."""
    cls = plugins.load("strategy", strategy)
    return isinstance(cls, type) and issubclass(cls, Strategy) and cls.needs == "estimate"


def plan(pairs: Iterable[tuple[str, str]], dtype: str) -> Iterator[Job]:
    """Yield the jobs of one backend in one dtype."""
    begun = set()
    for solver, strategy in pairs:
        if is_exact(strategy):
            names = EVERY_SOLVER if strategy in begun else (*ONE_SOLVER, *EVERY_SOLVER)
            begun.add(strategy)
            yield from (exact_job(name, solver, strategy, dtype) for name in names)
        else:
            yield fixed_job(solver, strategy, dtype)


def exact_job(problem: str, solver: str, strategy: str, dtype: str) -> Job:
    """Return a solve to what the dtype can reach."""
    rtol = tolerance_of(golden(problem), dtype)
    return Job("solve", problem, dtype, solver, strategy, {}, tight(strategy, rtol), rtol, MAX_STEPS)


def fixed_job(solver: str, strategy: str, dtype: str, jitter: int = 0) -> Job:
    """Return a few steps without a tolerance: the same algorithm everywhere, so the same answer."""
    steps = FEW_STEPS if worker.solves_inside(plugins.make_solver(solver, {})) else FIXED_STEPS
    options = {"steps": steps} if solver_steps(strategy) else {}
    return Job("solve", FIXED_PROBLEM, dtype, solver, strategy, {}, options, max_steps=steps, jitter=jitter)


def solver_steps(strategy: str) -> bool:
    """Return whether a strategy records a number of the solver's own steps."""
    made = plugins.make_strategy(strategy, {})
    return isinstance(made, StepStrategy) and not made.solves() and "steps" in option_names(strategy)


def option_names(strategy: str) -> set[str]:
    """Return the names of a strategy's options."""
    cls: Any = plugins.load("strategy", strategy)
    return {field.name for field in fields(cls)}


def tight(strategy: str, rtol: float) -> dict[str, object]:
    """Return the options that make an exact strategy as exact as `rtol`."""
    available = option_names(strategy)
    return {name: value for name, value in {"rtol": rtol, "max_steps": ADJOINT_STEPS}.items() if name in available}


def tolerance_of(problem: Golden, dtype: str) -> float:
    """Return the relative tolerance of both solves."""
    return tolerance(float(np.finfo(dtype).eps), problem.truth.jacobian.shape[1])


def jittered(pairs: Iterable[tuple[str, str]], dtype: str) -> Iterator[Job]:
    """Yield the reference's runs on data changed by one unit in the last place: what rounding does to each algorithm.

    In float64, where a promise takes their place, only for estimates: that figure is worth knowing.
    """
    for solver, strategy in pairs:
        estimate = needs_estimate(strategy)
        if estimate or (dtype != "float64" and not is_exact(strategy)):
            for seed in JITTERS if estimate else JITTERS[:1]:
                yield fixed_job(solver, strategy, dtype, seed)


def reference_of(backends: Sequence[str]) -> str:
    """Return the backend that the others are compared with: the first that needs no framework."""
    light = [name for name, spec in plugins.backends().items() if spec.package is None]
    return next((name for name in backends if name in light), light[0] if light else backends[0])


def execute(jobs: Mapping[tuple[str, str], list[Job]], tell: Callable[[str], None]) -> list[GradientRun]:
    """Run all jobs, each backend and dtype in its own process."""
    runs: list[GradientRun] = []
    with tempfile.TemporaryDirectory(prefix="deqcore-check-") as folder:
        tasks = {}
        for (backend, dtype), own in jobs.items():
            task = WorkerTask(Path(folder) / f"{backend}-{dtype}", backend, dtype)
            worker.write(task.folder, backend, own)
            tasks[task] = own
        for task, failure in run_all(list(tasks), tell).items():
            own = tasks[task]
            result = [(failure, 0.0, {})] * len(own) if failure else worker.read(task.folder)
            runs += [GradientRun(task.backend, job, *outcome) for job, outcome in zip(own, result, strict=True)]
    return runs


def truth_arrays(problem: Golden) -> dict[str, Any]:
    """Return the stored truth under the names that a worker uses."""
    truth = problem.truth
    result = dict(walk(truth.z, "z"))
    result |= dict(walk(unraveled(truth.gradients["cotangent"], problem.problem.z0), "cotangent"))
    return result | {name: value for name, value in truth.gradients.items() if name != "cotangent"}


def judge(runs: Sequence[GradientRun], chosen: Sequence[str]) -> Iterator[Comparison]:
    """Compare every run that ended with the truth and with the reference."""
    reference = {
        run.job.key: run
        for name in (*chosen, reference_of(chosen))  # the last one wins: the reference, if it ran the job
        for run in runs
        if run.backend == name and not run.error
    }
    for run in runs:
        if run.error or run.backend not in chosen or run.job.jitter:
            continue
        other = reference.get(run.job.key, run)
        if is_exact(run.job.strategy):
            problem = golden(run.job.problem)
            bounds = bounds_of(run.job, problem)
            yield from compare(run, "truth", truth_arrays(problem), bounds)
            if other.backend != run.backend:
                twice = {name: 2 * bound for name, bound in bounds.items()}
                yield from compare(run, other.backend, other.arrays, twice)
        elif other.backend != run.backend:
            yield from compare(run, other.backend, other.arrays, allowed(run.job, other, runs))


def bounds_of(job: Job, problem: Golden) -> dict[str, float]:
    """Return the bounds of an exact job, by quantity."""
    eps, n = float(np.finfo(job.dtype).eps), problem.truth.jacobian.shape[1]
    result = problem.truth.sensitivity.bounds(eps, n, job.rtol, job.rtol)
    return {"z": result.pop("value"), **result}


def allowed(job: Job, reference: GradientRun, runs: Sequence[GradientRun]) -> dict[str, float]:
    """Return what frameworks may differ by after the same steps: a promise in float64, measured in narrower dtypes."""
    names = quantities(reference.arrays)
    if job.dtype == "float64":
        return {name: SAME * size(reference.arrays, name) for name in names}
    near = [run for run in runs if run.job.jitter and not run.error and same_algorithm(run.job, job)]
    spread = {
        name: max((differ(run.arrays, reference.arrays, name)[0] for run in near), default=float("inf"))
        for name in names
    }
    eps = float(np.finfo(job.dtype).eps)
    return {name: SPREAD * max(value, eps * size(reference.arrays, name)) for name, value in spread.items()}


def same_algorithm(a: Job, b: Job) -> bool:
    """Return whether two jobs differ in their data only."""
    return (a.problem, a.solver, a.strategy, a.dtype) == (b.problem, b.solver, b.strategy, b.dtype)


def compare(
    run: GradientRun, against: str, expected: Mapping[str, Any], bounds: Mapping[str, float]
) -> Iterator[Comparison]:
    """Compare all quantities that have a bound."""
    job = run.job
    for name in quantities(run.arrays, expected):
        if name in bounds:
            error, relative, cosine, place = differ(run.arrays, expected, name)
            yield Comparison(
                job.problem,
                run.backend,
                against,
                job.dtype,
                job.solver,
                job.strategy,
                name,
                error,
                relative,
                cosine,
                bounds[name],
                place,
            )


def spreads(runs: Sequence[GradientRun]) -> dict[str, float]:
    """Return how far one unit in the last place of the data moves each approximate gradient, relative, the largest."""
    plain = [run for run in runs if not run.job.jitter and not run.error]
    results: dict[str, float] = {}
    for run in runs:
        base = next((p for p in plain if same_algorithm(p.job, run.job) and p.backend == run.backend), None)
        if run.job.jitter and not run.error and base is not None:
            key = f"{run.job.solver} {run.job.strategy} {run.job.dtype}"
            gaps = [differ(run.arrays, base.arrays, name)[1] for name in quantities(run.arrays) if name != "z"]
            results[key] = max(results.get(key, 0.0), *gaps)
    return results
