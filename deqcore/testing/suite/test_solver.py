"""Every solver that was asked for, or is registered."""

from deqcore.testing.solvers import SolverTests


class TestSolver(SolverTests):
    """Named by `--deqcore-solver`."""
