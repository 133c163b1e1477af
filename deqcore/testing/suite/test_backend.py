"""Every backend that was asked for, or is installed."""

from deqcore.testing.suite.backend.tests import BackendTests


class TestBackend(BackendTests):
    """Named by `--deqcore-backend`."""
