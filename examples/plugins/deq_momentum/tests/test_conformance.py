from deqcore.testing import SolverTests


class TestMomentum(SolverTests):
    solvers = ("momentum",)
    backends = ("numpy", "strict")
