"""`deqcore check gradients --problem`: a user's own function, in every framework that it is written for.

Each framework is compared with a dense reference made in that framework (is the implicit gradient right?) and with
the other frameworks (do two implementations of one model agree?). The bound comes from the same dense Jacobian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np

from deqcore import plugins
from deqcore.errors import ProblemError, listing
from deqcore.testing.gradients.compare import Comparison, size
from deqcore.testing.gradients.sweep import (
    GradientReport,
    GradientRun,
    combinations,
    compare,
    execute,
    is_exact,
    reference_of,
    tight,
)
from deqcore.testing.jobs import Job
from deqcore.testing.problem import Problem, load_problem, walk
from deqcore.testing.runner.processes import installed
from deqcore.testing.tolerances import Sensitivity, Slope, rounding, tolerance

MANY: Final = 4000  # numbers in parameters and inputs above which a backend without autodiff is left out


def check_user_problem(
    where: str,
    backends: Sequence[str] = (),
    solvers: Sequence[str] = (),
    strategies: Sequence[str] = (),
    dtypes: Sequence[str] = ("float64", "float32"),
    tell: Callable[[str], None] = lambda _: None,
) -> GradientReport:
    """Check the gradients of one problem.

    Args:
        where: `path/to/file.py:name`.
        backends: names; default: all installed that the problem is written for.
        solvers: names; default: broyden.
        strategies: names of exact strategies; default: exact-ift.
        dtypes: names.
        tell: called with lines about progress.

    Raises:
        ProblemError: the file or the problem in it is wrong, or a strategy has no truth to be held to.
        UnknownNameError: a name is not registered.
        MissingFrameworkError: the framework of a named backend is not installed.
    """
    problem = load_problem(where)
    chosen = _backends(problem, backends)
    pairs = list(combinations(solvers or ("broyden",), strategies or ("exact-ift",)))
    for _, strategy in pairs:
        if not is_exact(strategy):
            raise ProblemError(
                f"The strategy {strategy!r} approximates the gradient, so there is nothing to hold it to: with "
                f"--problem name exact ones ({listing(filter(is_exact, plugins.strategies()))})."
            )
    jobs: dict[tuple[str, str], list[Job]] = {}
    for name in chosen:
        for dtype in dtypes:
            jobs[name, dtype] = [_solve_job(where, problem, *pair, dtype) for pair in pairs]
            # The reference is computed in float64, also on data rounded to float32: that is float32's truth.
            jobs.setdefault((name, "float64"), []).append(Job("dense", where, "float64", pairs[0][0], data=dtype))
    return own_report(execute(jobs, tell), chosen)


def _backends(problem: Problem, named: Sequence[str]) -> tuple[str, ...]:
    written = problem.backends
    if written is not None:
        for name in (*written, *named):
            plugins.spec("backend", name)
        missing = [name for name in named if name not in written]
        if missing:
            raise ProblemError(
                f"Problem {problem.name!r} has functions for {listing(written)}, but none for {listing(missing)}."
            )
    result = tuple(name for name in installed(named) if written is None or name in written)
    if not result:
        raise ProblemError(f"{problem.name!r} runs on none of the installed frameworks. Install one of its frameworks.")
    count = sum(np.size(leaf) for _, leaf in problem.leaves())
    if not named and count > MANY:
        result = tuple(name for name in result if plugins.backends()[name].package) or result
    return result


def _solve_job(where: str, problem: Problem, solver: str, strategy: str, dtype: str) -> Job:
    rtol = tolerance(float(np.finfo(dtype).eps), _width(problem))
    return Job("solve", where, dtype, solver, strategy, {}, tight(strategy, rtol), rtol, 500)


def _width(problem: Problem) -> int:
    """Return the elements of one sample's state."""
    leaves = [np.asarray(leaf) for _, leaf in walk(problem.z0, "z0")]
    return sum(leaf[0].size if problem.batch and len(leaf) else leaf.size for leaf in leaves)


def own_report(runs: Sequence[GradientRun], chosen: Sequence[str]) -> GradientReport:
    """Compare the solves with the dense references and with each other."""
    solves = [run for run in runs if run.job.kind == "solve"]
    return GradientReport(runs, list(_comparisons(solves, references(runs), chosen)), {})


def references(runs: Sequence[GradientRun]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return the arrays of the dense references that were found, by backend and dtype of the data."""
    return {(run.backend, run.job.data): run.arrays for run in runs if run.job.kind == "dense" and not run.error}


def sensitivity_of(arrays: Mapping[str, Any]) -> Sensitivity:
    """Return what a worker found about the condition of its problem."""
    prefix = "slope:"
    slopes = {
        name.removeprefix(prefix): Slope(*map(float, value))
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
    inverse, jacobian, condition, state, cotangent, adjoint = map(float, arrays["sensitivity"])
    return Sensitivity(inverse, jacobian, condition, state, cotangent, adjoint, slopes)


def _comparisons(
    solves: Sequence[GradientRun], dense: Mapping[tuple[str, str], Mapping[str, Any]], chosen: Sequence[str]
) -> Iterator[Comparison]:
    reference = reference_of(chosen)
    first = reference if reference in chosen else chosen[0]
    others = {run.job.key: run for run in solves if run.backend == first and not run.error}
    for run in solves:
        truth = dense.get((run.backend, run.job.dtype))
        if run.error or truth is None:
            continue
        bounds = _bounds(run, truth)
        yield from compare(run, "dense reference", truth, bounds)
        other = others.get(run.job.key)
        other_truth = dense.get((first, run.job.dtype))
        if other is not None and other is not run and other_truth is not None:
            twice = {name: bounds.get(name, 0.0) + bound for name, bound in _bounds(other, other_truth).items()}
            yield from compare(run, other.backend, other.arrays, twice)


def _bounds(run: GradientRun, truth: Mapping[str, Any]) -> dict[str, float]:
    eps, n = float(np.finfo(run.job.dtype).eps), int(truth["n"])
    result = sensitivity_of(truth).bounds(eps, n, run.job.rtol, run.job.rtol)
    start = rounding(eps, n) * (size(run.arrays, "f(z0)") + size(truth, "z"))
    # What rounding left of the reference itself: its residual, and its products in float64.
    floor = sensitivity_of(truth).bounds(float(np.finfo("float64").eps), n, 0.0, 0.0)
    result = {name: bound + floor[name] for name, bound in result.items()}
    return {"f(z0)": start, "z": result.pop("value"), **result}
