"""`StrategyTests`: everything that a backward strategy must keep.

`solve_adjoint` is held to known Jacobians: g + Jᵀu = u has a closed form. Strategies that promise the true gradient
(`exact`) must find it; approximate ones must be right where there is nothing to approximate, must be no worse than
the bare cotangent where f contracts strongly, and must report truthfully what they did.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.abc.backward import StepStrategy, Strategy
from deqcore.testing.problems import golden
from deqcore.testing.suite.backend.arguments import check_golden
from deqcore.testing.suite.base import DTYPES, ProcessTests, chosen, needs, several
from deqcore.testing.suite.complex_states import ComplexStrategyTests
from deqcore.testing.suite.fixtures import Kit, affine, close
from deqcore.testing.suite.scales import scaled, scales
from deqcore.testing.suite.strategy.adjoint import AdjointTests
from deqcore.testing.suite.strategy.cost_bounds import ClaimTests
from deqcore.testing.suite.strategy.state import StateTests
from deqcore.testing.suite.strategy.step_strategy import StepStrategyTests
from deqcore.testing.suite.strategy.units import UnitTests
from deqcore.testing.tolerances import tolerance


class StrategyTests(
    AdjointTests, ClaimTests, StateTests, StepStrategyTests, UnitTests, ComplexStrategyTests, ProcessTests
):
    """Subclass it, name your strategy, and run pytest.

    Attributes:
        strategies: registered names; default: the option `--deqcore-strategy`, else all.
        options: options of the strategy.
        cost_bounds: instead of the strategy's own, which hold for its default options only.

    Example:
        ::

            class TestMine(StrategyTests):
                strategies = ("mine",)
    """

    strategies: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, object]] = {}

    def subjects(self) -> dict[str, Callable[[Any], Sequence[str]]]:
        """Return the strategies to test."""
        names = lambda config: self.strategies or chosen(config, "strategy") or tuple(plugins.strategies())  # noqa: E731
        return {"strategy_name": names}

    @pytest.fixture
    def settings(self, request: Any) -> Mapping[str, object]:
        """Options of the strategy."""
        given = chosen(request.config, "options")
        return {**self.options, **(json.loads(given) if given else {})}

    @pytest.fixture
    def any_strategy(self, kit: Kit, strategy_name: str, settings: Mapping[str, object]) -> Strategy | StepStrategy:
        """The strategy under test."""
        return plugins.make_strategy(strategy_name, settings)

    @pytest.fixture
    def strategy(self, any_strategy: Strategy | StepStrategy) -> Strategy:
        """The same, if it routes a cotangent."""
        if not isinstance(any_strategy, Strategy):
            pytest.skip("the strategy differentiates through steps")
        return any_strategy.bind(plugins.make_solver)

    @pytest.fixture
    def tight(self, strategy: Strategy, strategy_name: str, settings: Mapping[str, object]) -> Mapping[str, object]:
        """The options, with the tolerance as small as the widest dtype allows."""
        known = {field.name for field in fields(strategy)}  # type: ignore[arg-type]
        return {"rtol": 1e-12, **settings} if "rtol" in known else settings

    @pytest.fixture
    def call(self, kit: Kit, strategy_name: str, settings: Mapping[str, object]) -> Callable[[], object]:
        """A gradient."""
        b = kit.array(np.ones((2, 3)))
        config = kit.config(rtol=1e-3, strategy=strategy_name, strategy_options=settings)
        return lambda: deqcore.vjp(lambda z, b: 0.25 * z + b, 0 * b, b, cotangent=b, config=config)

    @several(
        ("name", "dtype"),
        [*((name, "float64") for name in ("affine", "tree", "expansive", "slow-modes")), ("tree", "float32")],
    )
    def test_golden_gradients(
        self, kit: Kit, strategy: Strategy, strategy_name: str, tight: Any, name: str, dtype: str
    ) -> None:
        """Compare exact strategies with the stored gradients, within what tolerance, dtype and condition explain."""
        if not strategy.exact:
            pytest.skip("the strategy approximates")
        known = golden(name)
        rtol = tolerance(float(np.finfo(dtype).eps), known.truth.jacobian.shape[1])
        options = {**tight, "rtol": rtol} if "rtol" in tight else tight
        f, z0, args = kit.data(known, dtype)
        config = kit.config(rtol=rtol, strategy=strategy_name, strategy_options=options)
        g = kit.tree(known.problem.direction(), dtype)
        z, gradients = deqcore.vjp(f, z0, *args, cotangent=g, config=config)
        check_golden(kit, known, z, gradients, dtype, rtol)

    def test_the_gradient_for_every_argument(self, kit: Kit, strategy_name: str, settings: Any) -> None:
        """Compare all strategies with the true gradient of a nearly flat f, which each must approximate."""
        problem = affine(batch=2, n=3, norm=0.05)  # small: a backend may take a solve for each number
        f = lambda z, a, b, c: kit.backend.xp.sum(a * z[:, None, :], axis=2) + b + c["c"][0]  # noqa: E731
        a, b, g = kit.array(problem.a), kit.array(problem.b), np.random.default_rng(6).standard_normal((2, 3))
        config = kit.config(strategy=strategy_name, strategy_options=settings)
        args = (a, b, {"c": [0 * b]})
        z, (da, db, dc) = deqcore.vjp(f, 0 * b, *args, cotangent=kit.array(g), config=config)
        u = problem.adjoint(g)
        close(kit.numpy(z), problem.root, 1e-4, "z*")
        for name, result, expected in (
            ("b", db, u),
            ("c", dc["c"][0], u),
            ("A", da, u[:, :, None] * problem.root[:, None, :]),
        ):
            close(kit.numpy(result), expected, 0.06, f"gradient for {name}")

    @needs("autodiff")
    def test_an_argument_that_is_computed_from_another_counts_once(
        self, kit: Kit, strategy_name: str, settings: Any
    ) -> None:
        """Compare the gradient in x of a solve with h = 2 x and x as arguments with those in both alone."""
        if not kit.eager:
            pytest.skip("in traced code arguments are inputs without a history")
        problem, g = affine(norm=0.5), kit.array(np.random.default_rng(6).standard_normal((3, 6)))
        a, x, xp = kit.array(problem.a), kit.array(problem.b), kit.backend.xp
        f = lambda z, h, x: xp.tanh(xp.sum(a * z[:, None, :], axis=2) + h) + x  # noqa: E731
        config = kit.config(rtol=1e-8, strategy=strategy_name, strategy_options=settings)
        _, (dh, dx) = deqcore.vjp(f, 0 * x, 2.0 * x, x, cotangent=g, config=config)

        def value(x: Any) -> tuple[Any, None]:
            return deqcore.fixed_point(f, 0 * x, 2.0 * x, x, config=config).value, None

        _, _, (result,) = kit.backend.autodiff.vjp(value, (x,), g)
        close(kit.numpy(result), 2.0 * kit.numpy(dh) + kit.numpy(dx), 1e-5, "gradient in x")

    @needs("autodiff")
    @several("dtype", DTYPES)
    def test_a_problem_in_other_units_has_the_same_gradients(
        self, kit: Kit, strategy_name: str, settings: Any, dtype: str
    ) -> None:
        """Solve and differentiate s f(z/s) with s at both ends of the range, with every strategy."""
        problem, g = affine(norm=0.5), np.random.default_rng(6).standard_normal((3, 6))
        a, xp = kit.array(problem.a, dtype), kit.backend.xp
        config = kit.config(rtol=1e-4, strategy=strategy_name, strategy_options=settings)

        def gradient(s: Any) -> list[Any]:
            f = scaled(kit, lambda z: xp.tanh(xp.sum(a * z[:, None, :], axis=2)), s, dtype)
            b, cotangent = kit.array(problem.b * s[:, None], dtype), kit.array(g, dtype)
            z, (db,) = deqcore.vjp(lambda z, b: f(z) + b, 0 * b, b, cotangent=cotangent, config=config)
            return [kit.numpy(z) / s[:, None], kit.numpy(db)]

        for name, result, expected in zip(
            ("z*", "gradient"), gradient(scales(3, dtype)), gradient(np.ones(3)), strict=True
        ):
            close(result, expected, 1e-4, f"{name} in other units")

    @several("dtype", DTYPES)
    def test_gradients_have_the_dtype_of_their_argument(
        self, kit: Kit, strategy_name: str, settings: Any, dtype: str
    ) -> None:
        b = kit.array(np.ones((2, 3)), dtype)
        config = kit.config(rtol=1e-3, strategy=strategy_name, strategy_options=settings)
        z, (db,) = deqcore.vjp(lambda z, b: 0.25 * z + b, 0 * b, b, cotangent=b, config=config)
        assert kit.backend.dtype_name(z) == kit.backend.dtype_name(db) == dtype, (
            "z and the gradients must keep the dtype of their arrays."
        )
