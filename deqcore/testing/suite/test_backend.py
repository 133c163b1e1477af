"""Every backend that was asked for, or is installed."""

from deqcore.testing.backends import BackendTests


class TestBackend(BackendTests):
    """Named by `--deqcore-backend`."""
