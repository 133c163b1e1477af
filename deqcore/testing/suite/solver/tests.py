"""`SolverTests`: everything that a solver must keep.

Convergence is demanded only where plain iteration converges within the budget, and on the golden problems that the
solver has a cost bound for (`deqcore.Solver.cost_bounds`), there within that bound. An honest status is demanded
everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.abc.solver import Solver
from deqcore.testing.problems import golden, names, raveled
from deqcore.testing.suite.base import DTYPES, ProcessTests, chosen, claimed, several
from deqcore.testing.suite.complex_states import ComplexSolverTests
from deqcore.testing.suite.fixtures import Affine, Kit, affine, close
from deqcore.testing.suite.scales import scaled, scales, times
from deqcore.testing.suite.solver.estimate import EstimateTests
from deqcore.testing.suite.solver.search import SearchTests
from deqcore.testing.suite.solver.steps import StepTests
from deqcore.testing.suite.solver.termination import EndTests
from deqcore.testing.suite.solver.units import UnitTests
from deqcore.testing.tolerances import tolerance
from deqcore.types import Status

MAX_STEPS: Final = 300


class SolverTests(StepTests, SearchTests, EstimateTests, EndTests, UnitTests, ComplexSolverTests, ProcessTests):
    """Subclass it, name your solver, and run pytest.

    Attributes:
        solvers: registered names; default: the option `--deqcore-solver`, else all.
        options: options of the solver.
        cost_bounds: instead of the solver's own, which hold for its default options only.

    Example:
        ::

            class TestMine(SolverTests):
                solvers = ("mine",)
                options = {"history_size": 5}
    """

    solvers: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, object]] = {}
    cost_bounds: ClassVar[Mapping[str, int] | None] = None

    def subjects(self) -> dict[str, Callable[[Any], Sequence[str]]]:
        """Return the solvers to test."""
        return {"solver_name": lambda config: self.solvers or chosen(config, "solver") or tuple(plugins.solvers())}

    def required(self, request: Any) -> Sequence[str]:
        """Return the capabilities that the solver declares."""
        result: Any = plugins.load("solver", request.getfixturevalue("solver_name"))
        return tuple(result.needs)

    @pytest.fixture
    def settings(self, request: Any) -> Mapping[str, object]:
        """Options of the solver."""
        given = chosen(request.config, "options")
        return {**self.options, **(json.loads(given) if given else {})}

    @pytest.fixture
    def solver(self, kit: Kit, solver_name: str, settings: Mapping[str, object]) -> Solver:
        """The solver under test."""
        return plugins.make_solver(solver_name, settings)

    @pytest.fixture
    def call(self, kit: Kit, solver_name: str, settings: Mapping[str, object]) -> Callable[[], object]:
        """A solve."""
        return lambda: self._solve(kit, affine(), solver_name, settings)

    @several("dtype", DTYPES)
    @several("problem", names())
    def test_golden(
        self, request: Any, kit: Kit, solver: Solver, solver_name: str, settings: Any, problem: str, dtype: str
    ) -> None:
        """Check the status of every sample, and convergence to the stored z* where that is required."""
        self._golden(request, kit, solver, solver_name, settings, problem, dtype, None)

    @several(("problem", "dtype"), [*((name, "float32") for name in names()), ("mlp", "float64"), ("tree", "float64")])
    def test_units_of_golden_problems(
        self, request: Any, kit: Kit, solver: Solver, solver_name: str, settings: Any, problem: str, dtype: str
    ) -> None:
        """Solve s f(z/s) with s near 1e±25 in float32 and 1e±200 in float64: no norm or product may overflow."""
        batch = len(golden(problem).truth.healthy)
        self._golden(request, kit, solver, solver_name, settings, problem, dtype, scales(batch, dtype))

    def _golden(
        self,
        request: Any,
        kit: Kit,
        solver: Solver,
        solver_name: str,
        settings: Any,
        problem: str,
        dtype: str,
        units: Any,
    ) -> None:
        known = golden(problem)
        truth, n = known.truth, known.truth.jacobian.shape[1]
        rtol = tolerance(float(np.finfo(dtype).eps), n)
        f, z0, args = kit.data(known, dtype)
        if units is not None:
            f, z0 = scaled(kit, f, units, dtype), times(kit, z0, kit.array(units, dtype))
        sol = kit.solve(f, z0, *args, solver=solver_name, rtol=rtol, max_steps=MAX_STEPS, options=settings)
        one = np.ones(len(truth.healthy)) if units is None else units
        status, residual = kit.numpy(sol.status), kit.numpy(sol.residual) / one
        check_honest(kit, sol, rtol, dtype, one)
        assert not (status[~truth.healthy] == int(Status.CONVERGED)).any(), "a sample without solution converged"
        cost_bounds = claimed(request.config, self.cost_bounds, solver, settings)
        if (truth.contracts and truth.radius**MAX_STEPS < rtol) or problem in cost_bounds:
            left = [Status(int(code)).name for code in status[truth.healthy] if code != int(Status.CONVERGED)]
            assert not left, f"healthy samples ended as {left} with residuals {residual[truth.healthy]}"
        if problem in cost_bounds and dtype == "float64":
            spent = kit.numpy(sol.evaluations)[truth.healthy]
            assert spent.max() <= cost_bounds[problem], (
                f"{spent} evaluations; at most {cost_bounds[problem]} are claimed"
            )
        done = status == int(Status.CONVERGED)
        error = np.linalg.norm((raveled_of(kit, sol.value) / one[:, None] - raveled(truth.z, len(done)))[done])
        bound = truth.sensitivity.bounds(float(np.finfo(dtype).eps), n, rtol, rtol)["value"]
        assert error <= bound, f"converged samples are off z* by {error:.2e}; {bound:.2e} is explained"

    def test_claims_are_golden_problems(self, kit: Kit, solver: Solver) -> None:
        assert isinstance(solver.cost_bounds, Mapping), (
            f"cost_bounds must be {{problem: evaluations}} (got {solver.cost_bounds})"
        )
        assert set(solver.cost_bounds) <= set(names()), (
            f"cost_bounds must name golden problems only: {sorted(set(solver.cost_bounds) - set(names()))} are unknown."
        )

    @several("share", [1, 3])
    def test_two_halves_of_a_solve_are_the_whole(self, kit: Kit, solver_name: str, settings: Any, share: int) -> None:
        problem = affine(norm=0.8)
        f, z0 = kit.map(problem), kit.array(np.zeros((3, 6)))

        def run(steps: int, state: Any) -> deqcore.Solution:
            config = kit.config(solver=solver_name, rtol=1e-9, max_steps=steps, options=settings)
            return deqcore.fixed_point(f, z0, state=state, config=config)

        whole, first = run(7, None), run(share, None)
        both = run(7 - share, first.state)
        assert list(kit.numpy(both.steps)) == list(kit.numpy(whole.steps)), (
            "a solve in two halves must take the steps of the whole solve. Keep everything that a step needs "
            "in the solver's state, and nothing in the solver itself."
        )
        close(kit.numpy(both.value), kit.numpy(whole.value), 1e4 * kit.eps, "value after two halves")

    @several("first", [2, 60])
    @several("rows", [[1], [0, 1, 2]])
    def test_a_state_of_another_problem_is_a_warm_start(
        self, kit: Kit, solver_name: str, settings: Any, first: int, rows: list[int]
    ) -> None:
        """Change f for some samples: they get the new answer, and the bits of the other samples do not change."""
        problem = affine(norm=0.5)
        b = problem.b.copy()
        b[rows] += 1.0

        def run(b: Any, steps: int, state: Any) -> deqcore.Solution:
            config = kit.config(solver=solver_name, rtol=1e-9, max_steps=steps, options=settings)
            f, z0 = kit.map(Affine(problem.a, b)), kit.array(np.zeros((3, 6)))
            return deqcore.fixed_point(f, z0, state=state, config=config)

        before = run(problem.b, first, None)
        same, other = (run(each, 300, before.state) for each in (problem.b, b))
        z, root = kit.numpy(other.value), Affine(problem.a, b).root
        true = np.linalg.norm(np.einsum("bij,bj->bi", problem.a, z) + b - z, axis=1)
        slack = 100 * kit.eps * (1 + np.linalg.norm(root, axis=1))
        reported = kit.numpy(other.residual)
        assert (np.abs(reported - true) <= slack).all(), f"stale state: reported {reported}, true {true}"
        done = kit.numpy(other.converged)
        assert (true[done] <= 10 * slack[done] + 1e-8).all() or not done.any(), "stale state: CONVERGED for another f"
        kept = [i for i in range(3) if i not in rows]
        assert np.array_equal(z[kept], kit.numpy(same.value)[kept]), "a sample sees that its neighbour's f has changed"

    def test_a_sample_is_solved_in_a_batch_as_alone(self, kit: Kit, solver_name: str, settings: Any) -> None:
        problem = affine(norm=0.8)
        problem.a[0] *= 0.2  # ends long before the others
        together = self._solve(kit, problem, solver_name, settings)
        for i in range(3):
            alone = self._solve(kit, Affine(problem.a[i : i + 1], problem.b[i : i + 1]), solver_name, settings)
            steps = int(kit.numpy(alone.steps)[0]), int(kit.numpy(together.steps)[i])
            assert abs(steps[0] - steps[1]) <= (steps[0] > 8), (
                f"sample {i}: {steps[0]} steps alone, {steps[1]} together"
            )
            result = kit.numpy(together.value)[i]
            close(result, kit.numpy(alone.value)[0], 1e-7 if kit.eps < 1e-10 else 1e-3, f"sample {i}")

    @several("harm", [np.nan, np.inf])
    def test_a_bad_sample_changes_no_bit_of_its_neighbours(
        self, kit: Kit, solver_name: str, settings: Any, harm: float
    ) -> None:
        problem = affine()
        b = problem.b.copy()
        b[1] = harm
        good = self._solve(kit, problem, solver_name, settings)
        bad = self._solve(kit, Affine(problem.a, b), solver_name, settings)
        for quantity in ("value", "residual", "steps", "status"):
            one, two = (kit.numpy(getattr(sol, quantity))[[0, 2]] for sol in (good, bad))
            assert np.array_equal(one, two), f"{quantity} of a healthy sample depends on its neighbour"
        assert Status(int(kit.numpy(bad.status)[1])) is Status.NONFINITE, (
            "the sample with NaN must end as NONFINITE, and only that one. Let NaN pass through; the loop handles it."
        )

    def test_a_start_at_the_solution_takes_no_step(self, kit: Kit, solver_name: str, settings: Any) -> None:
        z0 = kit.array(np.full((2, 3), 2.0))
        sol = kit.solve(lambda z: 0.5 * z + 1.0, z0, solver=solver_name, rtol=1e-9, options=settings)
        assert kit.numpy(sol.steps).max() == 0, "a start at the solution must take no step. Do not move z in `init`."
        assert kit.numpy(sol.converged).all(), (
            "a start at the solution must be CONVERGED. Return f(z) of the start from `init` unchanged."
        )
        assert np.array_equal(kit.numpy(sol.value), np.full((2, 3), 2.0)), (
            "a start at the solution must be returned as it is."
        )

    def test_a_solution_that_is_met_exactly(self, kit: Kit, solver_name: str, settings: Any) -> None:
        """Solve a constant f, which a method that tries f(z) solves in a step, without a division by zero."""
        one = kit.array(np.ones((2, 3)))
        sol = kit.solve(lambda z: one + 0 * z, 0 * one, solver=solver_name, rtol=0.0, options=settings, max_steps=60)
        check_honest(kit, sol, 0.0, "float64")
        close(kit.numpy(sol.value), np.ones((2, 3)), 1e-6, "value")

    @several("budget", [0, 1])
    def test_a_budget_is_kept(self, kit: Kit, solver_name: str, settings: Any, budget: int) -> None:
        problem = affine(norm=0.9)
        f, z0 = kit.map(problem), kit.array(np.zeros((3, 6)))
        sol = kit.solve(f, z0, solver=solver_name, rtol=1e-12, options=settings, max_steps=budget)
        assert list(kit.numpy(sol.steps)) == [budget] * 3, (
            "a solve that does not converge must use its whole budget of steps."
        )
        assert {Status(int(code)) for code in kit.numpy(sol.status)} <= {Status.MAX_STEPS, Status.CONVERGED}, (
            "a spent budget must end as MAX_STEPS (or CONVERGED if the last step met the tolerance)."
        )
        check_honest(kit, sol, 1e-12, "float64")

    def test_late_checks_change_nothing(self, kit: Kit, solver_name: str, settings: Any) -> None:
        problem = affine()
        soon, late = (self._solve(kit, problem, solver_name, settings, check_every=every) for every in (1, 5))
        assert np.array_equal(kit.numpy(soon.value), kit.numpy(late.value)), (
            "later host checks must not change the value. A step must not change samples that are not active."
        )
        assert np.array_equal(kit.numpy(soon.steps), kit.numpy(late.steps)), (
            "later host checks must not change the steps of a sample. A step must not change samples that are "
            "not active."
        )

    @several("shape", [(0, 3), (1, 3), (2, 1)])
    def test_small_batches(self, kit: Kit, solver_name: str, settings: Any, shape: tuple[int, int]) -> None:
        z0 = kit.array(np.zeros(shape))
        sol = kit.solve(lambda z: 0.5 * z + 1.0, z0, solver=solver_name, rtol=1e-9, options=settings)
        assert tuple(sol.value.shape) == shape, (
            "a batch of no sample, one sample or one number must keep its shape. Avoid squeeze and sizes "
            "taken from the data."
        )
        close(kit.numpy(sol.value), np.full(shape, 2.0), 1e-6, "value")

    def test_evaluations_are_at_least_those_of_the_steps(self, kit: Kit, solver_name: str, settings: Any) -> None:
        sol = self._solve(kit, affine(), solver_name, settings)
        assert (kit.numpy(sol.evaluations) >= 1 + kit.numpy(sol.steps)).all(), (
            "evaluations must be at least 1 + steps. Count every call of f in evaluations_per_step or in `evaluations`."
        )

    def _solve(self, kit: Kit, problem: Affine, name: str, options: Any, **settings: Any) -> deqcore.Solution:
        z0 = kit.array(np.zeros(problem.b.shape))
        return kit.solve(kit.map(problem), z0, solver=name, rtol=1e-9, options=options, **settings)


def raveled_of(kit: Kit, tree: Any) -> Any:
    """Return a state as a NumPy matrix `(batch, n)`."""
    leaves = [kit.numpy(leaf) for leaf in kit.backend.flatten(tree)[0]]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def check_honest(kit: Kit, sol: deqcore.Solution, rtol: float, dtype: str, units: Any = 1.0) -> None:
    """Check that the reported residual is the true one, and that CONVERGED means that it meets the tolerance.

    States are compared in these units, one for all samples or `(batch,)`.
    """
    assert sol.state is not None, "a solve must return sol.state, to continue from."
    carry, column = sol.state.carry, np.reshape(units, (-1, 1))
    z, fz = (kit.numpy(each).astype(float) / column for each in (carry.best_z, carry.best_fz))
    status, residual = kit.numpy(sol.status), kit.numpy(sol.residual).astype(float) / units
    if not kit.backend.capabilities.float64:
        rtol, dtype = max(rtol, 1e-5), "float32"
    true, size = np.linalg.norm(fz - z, axis=1), np.linalg.norm(fz, axis=1)
    rounding = 20 * np.finfo(dtype).eps * (size + np.linalg.norm(z, axis=1))
    known = np.isfinite(residual)
    wrong = np.abs(residual - true)[known] > rounding[known] + 1e-6 * true[known]
    assert not wrong.any(), f"residuals {residual} are reported, but ‖f(z) − z‖ is {true}"
    done = status == int(Status.CONVERGED)
    assert (true[done] <= rtol * size[done] + rounding[done]).all(), "CONVERGED, but the tolerance is not met"
    assert np.array_equal(raveled_of(kit, sol.value), kit.numpy(carry.best_z)), "the value is not the best iterate"
    assert set(status) <= {int(code) for code in Status if code is not Status.RUNNING}, (
        "every sample must end with a final status. RUNNING must not be left."
    )
