"""Every strategy that was asked for, or is registered."""

from deqcore.testing.strategies import StrategyTests


class TestStrategy(StrategyTests):
    """Named by `--deqcore-strategy`."""
