"""The tests of solvers that other libraries run from start to end: `pytest --pyargs deqcore.testing.suite.test_external`."""

from deqcore.testing.suite.external.tests import ExternalSolverTests


class TestExternalSolvers(ExternalSolverTests):
    """All adapters that were asked for."""
