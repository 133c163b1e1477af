"""Every solver that was asked for, or is registered."""

from deqcore.testing.suite.solver.tests import SolverTests


class TestSolver(SolverTests):
    """Named by `--deqcore-solver`."""
