from deqcore.testing import StrategyTests


class TestRichardson(StrategyTests):
    strategies = ("richardson",)
    backends = ("numpy", "strict")
