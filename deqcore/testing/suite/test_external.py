"""Solvers of other libraries that were asked for."""

from deqcore.testing.suite.external.tests import ExternalSolverTests


class TestExternalSolvers(ExternalSolverTests):
    """Named by `--deqcore-solver`."""
