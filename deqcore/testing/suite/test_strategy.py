"""Every strategy that was asked for, or is registered."""

from deqcore.testing.suite.strategy.tests import StrategyTests


class TestStrategy(StrategyTests):
    """Named by `--deqcore-strategy`."""
