"""A pytest fixture for the gradients of a user's own model: `pytest_plugins = ["deqcore.testing.pytest_gradients"]`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from deqcore.errors import ProblemError
from deqcore.testing.gradients.sweep import GradientReport
from deqcore.testing.gradients.user_problems import check_user_problem
from deqcore.testing.problem import Problem


@pytest.fixture
def check_gradients(request: pytest.FixtureRequest) -> Callable[..., GradientReport]:
    """`check_gradients(problem)` fails the test if a gradient is not what dtype, tolerance and condition explain.

    `problem` is `path/to/file.py:name`, relative to the test's folder, or a function at the top level of a module
    that returns a `deqcore.testing.Problem`. The keywords `backends`, `solvers`, `strategies` and `dtypes` choose as
    the options of `deqcore check gradients` do. Each framework runs in its own process, which imports the file.

    Example:
        In a test suite::

            def test_my_cell_has_the_same_gradients_everywhere(check_gradients):
                check_gradients("problems.py:cell", backends=["torch", "jax"])
    """
    folder = request.path.parent

    def check(
        problem: str | Callable[[], Problem],
        *,
        backends: Sequence[str] = (),
        solvers: Sequence[str] = (),
        strategies: Sequence[str] = (),
        dtypes: Sequence[str] = ("float64", "float32"),
    ) -> GradientReport:
        from deqcore.testing.gradients import render

        report = check_user_problem(where_of(problem, folder), backends, solvers, strategies, dtypes)
        if not report.ok:
            pytest.fail("\n".join(render.complaints(report)), pytrace=False)
        return report

    return check


def where_of(problem: str | Callable[[], Problem], folder: Path) -> str:
    """Return `path/to/file.py:name` of a problem.

    Raises:
        ProblemError: it is a function that another process could not find.
    """
    if isinstance(problem, str):
        path, _, name = problem.rpartition(":")
        return f"{os.path.normpath(folder / path)}:{name}" if path else problem
    name = getattr(problem, "__qualname__", "")
    file = inspect.getsourcefile(problem) if inspect.isfunction(problem) else None
    if file is None or not name.isidentifier():
        raise ProblemError(
            f"check_gradients({problem!r}): the problem must be 'path/to/file.py:name' or a function at the top level "
            f"of a module, since each framework imports it in its own process."
        )
    return f"{file}:{name}"
