"""Gradients with units of a sample that f couples, against the dense adjoint equation of the sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import deqcore
from deqcore.abc.backward import StepStrategy, Strategy
from deqcore.options import option_values
from deqcore.testing.suite.base import needs, several
from deqcore.testing.suite.fixtures import Kit, Tokens, close, tokens


class UnitTests:
    """Tests with `forward.batch = 2`."""

    @several(("norm", "tolerance"), [(0.6, 1e-6), (0.05, 0.06)])
    def test_the_gradient_of_coupled_units(
        self, kit: Kit, any_strategy: Any, strategy_name: str, settings: Any, norm: float, tolerance: float
    ) -> None:
        """Compare an exact strategy with the dense solution, and each strategy where f is nearly flat."""
        exact = isinstance(any_strategy, Strategy) and any_strategy.exact
        if norm > 0.5 and not exact:
            pytest.skip("the strategy approximates")
        problem = tokens(units=3, n=2, norm=norm)  # small: a backend may take a solve for each number
        g = np.random.default_rng(6).standard_normal(problem.b.shape)
        z, db = self._gradient(kit, strategy_name, settings, problem, g)
        close(z, problem.root, 1e-4, "z*")
        promised = [option_values(any_strategy).get(name) for name in ("max_relative_error", "rtol")]
        allowed = [4 * each for each in promised if isinstance(each, float)]  # ‖(I − J)^-1‖ is 1 / (1 − 0.6) at most
        close(db, problem.adjoint(g), max(tolerance, kit.eps**0.5, *allowed), "the gradient of coupled units")

    @needs("autodiff")
    def test_a_later_unit_changes_no_gradient_of_earlier_ones(
        self, kit: Kit, any_strategy: Strategy | StepStrategy, strategy_name: str, settings: Any
    ) -> None:
        """Differentiate a loss of the earlier units and change the last one: their gradient keeps every bit."""
        if not any_strategy.causal:
            pytest.skip("the strategy does not declare that it is causal")
        g = np.random.default_rng(6).standard_normal(tokens().b.shape)
        g[:, -1] = 0.0
        before, after = (
            self._gradient(kit, strategy_name, settings, problem, g, rtol=1e-3)[1][:, :-1]
            for problem in (tokens(), tokens().later())
        )
        change = np.abs(before - after).max()
        assert change == 0, f"the last unit changed the gradient of earlier ones by up to {change:.2g}"

    def _gradient(
        self, kit: Kit, name: str, settings: Any, problem: Tokens, g: Any, rtol: float = 1e-10
    ) -> tuple[Any, Any]:
        b = kit.array(problem.b)
        config = kit.config(rtol=rtol, strategy=name, strategy_options=settings, batch=2)
        z, (db,) = deqcore.vjp(kit.token_map(problem), 0 * b, b, cotangent=kit.array(g), config=config)
        return kit.numpy(z), kit.numpy(db)
