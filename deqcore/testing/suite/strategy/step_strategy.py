"""What a `StepStrategy` must keep: its gradient is that of its own value."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.abc.backward import StepStrategy, Strategy
from deqcore.errors import ConfigError
from deqcore.options import option_values
from deqcore.solve.adjoint import Steps
from deqcore.solve.loop import BoundSolve
from deqcore.testing.suite.base import DTYPES, Conformance, needs, several
from deqcore.testing.suite.fixtures import Affine, Kit, affine, close
from deqcore.testing.suite.scales import EXPONENTS, scaled, scales
from deqcore.types import Array, SolveResult, StoppingCriteria


class StepStrategyTests(Conformance):
    """Only for a `StepStrategy`."""

    @pytest.fixture
    def steps(self, any_strategy: Strategy | StepStrategy) -> StepStrategy:
        """The strategy under test, if it is one of steps."""
        if not isinstance(any_strategy, StepStrategy):
            pytest.skip("the strategy routes a cotangent")
        return any_strategy

    @several(("dtype", "sign"), [(dtype, sign) for dtype in DTYPES for sign in (-1, 1)])
    @needs("autodiff")
    def test_the_cotangent_may_be_of_the_size_of_the_states(
        self, kit: Kit, steps: StepStrategy, strategy_name: str, settings: Any, dtype: str, sign: int
    ) -> None:
        """Map a cotangent times s through s f(z/s), whose derivative multiplies it by s before it divides by s."""
        problem, g = affine(norm=0.5), np.random.default_rng(6).standard_normal((3, 6))
        a, xp = kit.array(problem.a, dtype), kit.backend.xp
        config = kit.config(rtol=1e-4, strategy=strategy_name, strategy_options=settings)

        def gradient(s: float) -> Any:
            f = scaled(kit, lambda z: xp.tanh(xp.sum(a * z[:, None, :], axis=2)), np.full(3, s), dtype)
            b = kit.array(problem.b * s, dtype)
            _, (db,) = deqcore.vjp(lambda z, b: f(z) + b, 0 * b, b, cotangent=kit.array(g * s, dtype), config=config)
            return kit.numpy(db) / s

        close(gradient(2.0 ** (sign * EXPONENTS[dtype])), gradient(1.0), 1e-4, "gradient in other units")

    @several("dtype", DTYPES)
    @needs("autodiff")
    def test_a_small_row_of_a_cotangent_counts_beside_a_large_one(
        self, kit: Kit, steps: StepStrategy, strategy_name: str, settings: Any, dtype: str
    ) -> None:
        """Map a cotangent with tiny and huge rows; the gradient of a shared argument sums over them."""
        problem, g = affine(norm=0.5), np.random.default_rng(6).standard_normal((3, 6))
        a, xp = kit.array(problem.a, dtype), kit.backend.xp
        config = kit.config(rtol=1e-4, strategy=strategy_name, strategy_options=settings)

        def gradient(s: Any) -> Any:
            b, cotangent = kit.array(problem.b, dtype), kit.array(g * s[:, None], dtype)
            f = lambda z, b: xp.tanh(xp.sum(a * z[:, None, :], axis=2)) + b  # noqa: E731
            return kit.numpy(deqcore.vjp(f, 0 * b, b, cotangent=cotangent, config=config)[1][0]) / s[:, None]

        close(gradient(scales(3, dtype)), gradient(np.ones(3)), 1e-4, "gradient of rows in other units")

    @several("units", ["of z", "of the loss", "of both, inversely"])
    @needs("autodiff")
    def test_a_gradient_by_the_framework_in_other_units(
        self, kit: Kit, steps: StepStrategy, strategy_name: str, settings: Any, units: str
    ) -> None:
        """Differentiate the value as `backward` and `grad` do, which scale no cotangent, with tiny and huge rows.

        z and g large together are left out: the derivative in a coefficient of a step is of the size of g z.
        """
        problem, g = affine(norm=0.5), np.random.default_rng(6).standard_normal((3, 6))
        a, xp, dtype = kit.array(problem.a, "float32"), kit.backend.xp, "float32"
        config = kit.config(rtol=1e-4, strategy=strategy_name, strategy_options=settings)

        def gradient(of_z: Any, of_g: Any) -> Any:
            f = scaled(kit, lambda z: xp.tanh(xp.sum(a * z[:, None, :], axis=2)), of_z, dtype)
            b, cotangent = kit.array(problem.b * of_z[:, None], dtype), kit.array(g * of_g[:, None], dtype)

            def value(b: Array) -> tuple[Array, None]:
                return deqcore.fixed_point(lambda z: f(z) + b, 0 * b, config=config).value, None

            _, _, (db,) = kit.backend.autodiff.vjp(value, (b,), cotangent)
            return kit.numpy(db) / of_g[:, None]

        one, s = np.ones(3), scales(3, dtype)
        of_z, of_g = {"of z": (s, one), "of the loss": (one, s), "of both, inversely": (s, 1 / s)}[units]
        close(gradient(of_z, of_g), gradient(one, one), 1e-4, "gradient in other units")

    @several("solver", ["picard", "broyden"])
    @needs("autodiff")
    def test_its_gradient_is_that_of_its_steps(
        self, kit: Kit, steps: StepStrategy, strategy_name: str, settings: Any, solver: str
    ) -> None:
        """Central differences of `value`, with the solution that it starts from held still."""
        if not kit.backend.capabilities.float64:
            pytest.skip("central differences need double precision")
        if steps.truncates():
            pytest.skip("the gradient is that of the last steps only")
        problem, g, h = affine(batch=2, n=3, norm=0.5), np.ones((2, 3)), 1e-6
        config = kit.config(solver=solver, rtol=1e-13, strategy=strategy_name, strategy_options=settings)
        slope = kit.map(Affine(problem.a, 0 * problem.b))

        def f(z: Array, b: Array) -> Array:
            return slope(z) + b

        b, z0 = kit.array(problem.b), kit.array(np.zeros((2, 3)))
        z, (db,) = deqcore.vjp(f, z0, b, cotangent=kit.array(g), config=config)
        forward = self._forward(kit, problem, solver) if steps.solves() else None

        def total(shift: Any) -> float:
            moved, method = kit.array(problem.b + shift), plugins.make_solver(solver)

            def shifted(z: Array) -> Array:
                return f(z, moved)

            value, _ = Steps(kit.backend, steps, method)(shifted, z0, forward)
            return float(np.sum(g * kit.numpy(value)))

        expected = np.zeros((2, 3))
        for index in np.ndindex(2, 3):
            shift = np.zeros((2, 3))
            shift[index] = h
            expected[index] = (total(shift) - total(-shift)) / (2 * h)
        close(kit.numpy(db), expected, 1e-5, "gradient of the steps")
        if steps.solves():
            close(kit.numpy(z), problem.root, 1e-5, "steps from the solution stay there")

    @several("solver", ["picard", "broyden"])
    def test_its_evaluations_are_the_calls_of_f(
        self, kit: Kit, steps: StepStrategy, strategy_name: str, settings: Any, solver: str
    ) -> None:
        """Count calls where one sample is at its solution after a step, and the other is not for many more."""
        if not kit.eager or steps.solves():
            pytest.skip("a traced loop calls f once, or evaluations are those of the solve before the steps")
        slope, calls = kit.array([[0.0], [0.5]]), []

        def f(z: Array) -> Array:
            calls.append(z)
            return kit.backend.xp.tanh(slope * z) + 1.0

        z0 = kit.array(np.zeros((2, 1)))
        sol = kit.solve(f, z0, solver=solver, rtol=1e-6, strategy=strategy_name, strategy_options=settings)
        spent = int(kit.numpy(sol.evaluations).max())
        assert spent == len(calls), f"{spent} evaluations are reported, but f was called {len(calls)} times"

    @needs("autodiff")
    def test_every_number_among_its_options_matters(
        self, kit: Kit, steps: StepStrategy, strategy_name: str, settings: Any
    ) -> None:
        """Change each numeric option: one that changes neither value nor gradient is not read."""
        b = kit.array(affine(batch=2, n=3, norm=0.5).b)

        def gradient(options: Any) -> Any:
            config = kit.config(solver="picard", strategy=strategy_name, strategy_options=options)
            z, (db,) = deqcore.vjp(lambda z, b: 0.5 * z + b, 0 * b, b, cotangent=b, config=config)
            return np.concatenate([kit.numpy(z), kit.numpy(db)])

        for name, value in option_values(steps).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                changed = value + 1 if isinstance(value, int) else 0.5 * value
                same = np.allclose(gradient({**settings, name: changed}), gradient(settings), rtol=1e-6)
                assert not same, f"{name} = {changed} gives the same value and gradient as {value}"

    def test_what_it_draws_follows_from_its_seed_and_the_training_step(
        self, kit: Kit, steps: StepStrategy, strategy_name: str, settings: Any
    ) -> None:
        """Solve at 16 training steps, twice: equal bits at equal steps, and not the same at all steps."""
        if not isinstance(option_values(steps).get("seed"), int):
            pytest.skip("the strategy draws nothing with these options")
        config = kit.config(strategy=strategy_name, strategy_options=settings)

        def drawn() -> Any:
            values = []
            for step in range(16):
                np.random.random()
                sol = deqcore.fixed_point(
                    lambda z: 0.5 * z + 1.0, kit.array([[0.0, 0.0]]), config=config, backward__step=step
                )
                values.append(kit.numpy(kit.backend.detach(sol.value))[0, 0])
            return np.array(values)

        first = drawn()
        assert np.array_equal(first, drawn()), "another draw at the same seed and step"
        assert len(set(first.tolist())) > 1, "the same draw at every step"

    @several("solver", ["picard", "broyden"])
    @needs("autodiff")
    def test_many_steps_come_near_the_gradient_of_the_solution(
        self, kit: Kit, steps: StepStrategy, strategy_name: str, settings: Any, solver: str
    ) -> None:
        """Take steps beyond the last digit: they must not divide rounding by rounding or spoil the gradient."""
        self._skip_unless_it_takes(kit, steps, strategy_name, settings, 60)
        problem, g = affine(batch=2, n=3, norm=0.5), np.ones((2, 3))
        slope = kit.map(Affine(problem.a, 0 * problem.b))
        config = kit.config(solver=solver, strategy=strategy_name, strategy_options={**settings, "steps": 60})
        b = kit.array(problem.b)
        z, (db,) = deqcore.vjp(lambda z, b: slope(z) + b, 0 * b, b, cotangent=kit.array(g), config=config)
        close(kit.numpy(z), problem.root, 1e-5, "value after 60 steps")
        close(kit.numpy(db), problem.adjoint(g), 1e-4 if kit.eps < 1e-10 else 1e-2, "gradient after 60 steps")

    @several("solver", ["picard", "anderson", "broyden", "newton-krylov"])
    @needs("autodiff")
    def test_a_derivative_is_not_frozen_with_its_value(
        self, kit: Kit, steps: StepStrategy, strategy_name: str, settings: Any, solver: str
    ) -> None:
        """z₂ = ½ z₂ + ¼ x₂ at x₂ = 0: the value 0 is there at once, its derivative ½ comes step by step."""
        self._skip_unless_it_takes(kit, steps, strategy_name, settings, 50)
        wanted: Any = plugins.load("solver", solver)
        if not all(getattr(kit.backend.capabilities, name) for name in wanted.needs):
            pytest.skip("the backend lacks what the solver needs")
        xp = kit.backend.xp
        x, g = kit.array([[1.0, 0.0], [0.0, 0.0]]), kit.array([[0.0, 1.0]] * 2)

        def f(z: Array, x: Array) -> Array:
            return xp.concat([xp.tanh(0.5 * z[:, :1]) + x[:, :1], 0.5 * z[:, 1:] + 0.25 * x[:, 1:]], axis=1)

        config = kit.config(
            solver=solver, rtol=1e-6, strategy=strategy_name, strategy_options={**settings, "steps": 50}
        )
        _, (dx,) = deqcore.vjp(f, 0 * x, x, cotangent=g, config=config)
        close(kit.numpy(dx)[:, 1], [0.5, 0.5], 1e-4, "frozen derivative: after 50 steps of slope ½")

    @several("solver", ["picard", "broyden"])
    @needs("autodiff")
    def test_its_residual_is_that_of_its_value(
        self, kit: Kit, steps: StepStrategy, strategy_name: str, settings: Any, solver: str
    ) -> None:
        """Require the true residual, or NaN with a status that claims no convergence."""
        problem = affine(norm=0.5)
        f, z0 = kit.map(problem), kit.array(np.zeros((3, 6)))
        sol = kit.solve(f, z0, solver=solver, rtol=1e-3, max_steps=5, strategy=strategy_name, strategy_options=settings)
        z = kit.numpy(kit.backend.detach(sol.value))
        true = np.linalg.norm(np.einsum("bij,bj->bi", problem.a, z) + problem.b - z, axis=1)
        reported, done = kit.numpy(sol.residual), kit.numpy(sol.converged)
        finite = np.isfinite(reported)
        close(reported[finite], true[finite], 1e3 * kit.eps, "the residual that is reported")
        assert not done[~finite].any(), "CONVERGED without a residual"
        assert (true[done] <= 1.01e-3 * np.linalg.norm(z, axis=1)[done] * 1.01).all(), "CONVERGED, but not the value"

    @several("dtype", DTYPES)
    @several("solver", ["picard", "broyden"])
    @needs("autodiff")
    def test_steps_beyond_the_last_digit_spoil_nothing(
        self, kit: Kit, steps: StepStrategy, strategy_name: str, settings: Any, solver: str, dtype: str
    ) -> None:
        """Step a curved f on, whose residuals stay at rounding without being zero; plain iteration is the truth."""
        self._skip_unless_it_takes(kit, steps, strategy_name, settings, 60)
        problem = affine(batch=32, n=3, norm=0.7)
        root = np.zeros((32, 3))
        for _ in range(300):
            root = np.tanh(np.einsum("bij,bj->bi", problem.a, root) + problem.b)
        bend = 1.0 - root**2
        u = Affine(bend[:, :, None] * problem.a, problem.b).adjoint(np.ones((32, 3)))
        a, b, xp = kit.array(problem.a, dtype), kit.array(problem.b, dtype), kit.backend.xp
        f = lambda z, b: xp.tanh(xp.sum(a * z[:, None, :], axis=2) + b)  # noqa: E731
        config = kit.config(
            solver=solver, rtol=1e-6, strategy=strategy_name, strategy_options={**settings, "steps": 60}
        )
        z, (db,) = deqcore.vjp(f, 0 * b, b, cotangent=0 * b + 1, config=config)
        slack = 1e-5 if kit.backend.dtype_name(z) == "float64" else 1e-3
        close(kit.numpy(z), root, slack, "value after 120 steps")
        close(kit.numpy(db), bend * u, slack, "gradient after 120 steps")

    def _skip_unless_it_takes(self, kit: Kit, steps: StepStrategy, name: str, settings: Any, count: int) -> None:
        """Skip where the strategy has no option for its steps, or refuses so many."""
        if not isinstance(option_values(steps).get("steps"), int):
            pytest.skip("the strategy has no option for the number of steps")
        config = kit.config(strategy=name, strategy_options={**settings, "steps": count})
        try:
            deqcore.fixed_point(lambda z: 0.5 * z, kit.array([[1.0]]), config=config)
        except ConfigError as error:
            pytest.skip(f"the strategy refuses: {error}")

    def _forward(self, kit: Kit, problem: Affine, solver: str) -> SolveResult:
        z0 = kit.array(np.zeros(problem.b.shape))
        numbers = [kit.backend.numbers.as_scalar(value, z0) for value in (1e-13, 0.0, 300)]
        iterate = BoundSolve(kit.backend, plugins.make_solver(solver), StoppingCriteria(*numbers))
        return kit.backend.autodiff.forward_only(kit.map(problem), z0, (), iterate)
