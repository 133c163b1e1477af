"""What ships passes its own suite: each built-in on each backend that is installed."""

from __future__ import annotations

from typing import ClassVar

from deqcore.testing import BackendTests, SolverTests, StrategyTests

LIGHT = ("numpy", "strict", "torch")  # JAX compiles each of some hundred tests: see test_jax.py


class TestBackends(BackendTests):
    backends = LIGHT


class TestSolvers(SolverTests):
    backends = LIGHT


class TestStrategies(StrategyTests):
    backends = LIGHT


class TestGuarded(SolverTests):
    """Steps that are refused, once and several times in a row."""

    backends = ("numpy",)
    solvers = ("broyden",)
    options: ClassVar = {"max_residual_growth": 2.0}
    cost_bounds: ClassVar = {"overshoot": 15, "walled": 33}


class TestAccelerated(SolverTests):
    """The default with all samples accelerated from their first step on, so that each has pairs."""

    backends = LIGHT
    solvers = ("auto",)
    options: ClassVar = {"slow": 1e-6, "patience": 4}
    expected_failures: ClassVar = {
        f"test_every_number_among_its_options_matters[{backend}-auto]": "with any small `slow` all samples accelerate"
        for backend in ("numpy", "torch")
    }


class TestSmallMemory(SolverTests):
    """Restarts and full rings."""

    backends = ("numpy", "torch")
    solvers = ("anderson", "broyden")
    options: ClassVar = {"history_size": 3}
    expected_failures: ClassVar = {
        "test_a_state_of_another_problem_is_a_warm_start[torch-broyden-rows0-2]": (
            "a step in which any sample restarts is taken by portable code, which rounds otherwise than the kernel"
        )
    }
