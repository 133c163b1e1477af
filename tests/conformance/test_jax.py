"""JAX passes the suite: the backend whole, solvers and strategies where compiling them is affordable.

`deqcore check solver NAME` and `deqcore check strategy NAME` run the rest; `make faults` does, too.
"""

from __future__ import annotations

import pytest

pytest.importorskip("jax")

from deqcore.testing import BackendTests, SolverTests, StrategyTests


class TestBackend(BackendTests):
    backends = ("jax",)


class TestSolver(SolverTests):
    backends = ("jax",)
    solvers = ("picard",)


class TestStrategy(StrategyTests):
    backends = ("jax",)
    strategies = ("neumann",)
