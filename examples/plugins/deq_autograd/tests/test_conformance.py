from deqcore.testing import BackendTests, SolverTests, StrategyTests


class TestBackend(BackendTests):
    backends = ("autograd",)


class TestSolvers(SolverTests):
    backends = ("autograd",)
    solvers = ("picard", "anderson", "broyden")


class TestStrategies(StrategyTests):
    backends = ("autograd",)
    strategies = ("exact-ift", "broyden-reuse", "jacobian-free", "neumann", "phantom", "unrolled")
