"""`ExternalSolverTests`: the facts by which a solver of another library is judged."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Final

import numpy as np
import pytest

from deqcore import plugins
from deqcore.abc.external import CLAIMS, ExternalResult, ExternalSolver
from deqcore.testing.suite.base import Conformance, chosen, several
from deqcore.testing.suite.external import cases
from deqcore.testing.suite.external.cases import Case
from deqcore.testing.suite.fixtures import Kit
from deqcore.testing.suite.process import Settings, shown

CLAIM: Final = "not claimed: "
GENEROUS: Final = 100.0
"""How far above its tolerance a true residual may be: each library has a rule and a norm of its own."""


class ExternalSolverTests(Conformance):
    """Subclass it, name your adapter, and run pytest.

    Attributes:
        solvers: registered names of `ExternalSolver`s; default: the option `--deqcore-solver`.
        options: options of the adapter.
    """

    solvers: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, object]] = {}

    def subjects(self) -> dict[str, Callable[[Any], Sequence[str]]]:
        """Return the adapters to test."""
        return {"solver_name": lambda config: self.solvers or chosen(config, "solver")}

    @pytest.fixture(autouse=True)
    def _checking(self, request: Any, kit: Kit) -> Iterator[None]:
        """Full precision; settings of the process that a solve changes are restored, and one test reports them."""
        settings = Settings.read(kit.backend)
        with kit.backend.harness.high_precision():
            yield
        changed = settings.restore()
        if request.node.name.startswith("test_settings_of_the_process_are_left_alone"):
            assert not changed, f"a solve changed {', '.join(changed)}, and did not change it back"

    @pytest.fixture
    def settings(self, request: Any) -> Mapping[str, object]:
        """Options of the adapter."""
        given = chosen(request.config, "options")
        return {**self.options, **(json.loads(given) if given else {})}

    @pytest.fixture
    def solver(self, kit: Kit, solver_name: str, settings: Mapping[str, object]) -> ExternalSolver:
        """The adapter under test."""
        made = plugins.make_solver(solver_name, settings)
        if not isinstance(made, ExternalSolver):
            pytest.skip(f"{solver_name} is not a deqcore.abc.external.ExternalSolver")
        return made

    @pytest.fixture
    def judge(self, kit: Kit, solver: ExternalSolver, solver_name: str, record_property: Any) -> Judge:
        """The adapter with the means to run cases on it."""
        return Judge(kit, solver, solver_name, record_property)

    def test_claims_have_known_names(self, judge: Judge) -> None:
        unknown = sorted(set(judge.solver.claims) - set(CLAIMS))
        assert not unknown, f"claims must be among {sorted(CLAIMS)} (got {unknown})"

    @several("problem", list(cases.EASY))
    def test_it_solves_what_plain_iteration_solves(self, judge: Judge, problem: str) -> None:
        case = cases.EASY[problem]
        result = judge.solve(case, f"the solution is {case.truth.round(6).tolist()}")
        error = distance(judge.numpy(result.z), case.truth)
        if result.evaluations is not None:
            judge.note("evaluations", int(np.max(judge.numpy(result.evaluations))))
        if case is cases.CURVED:
            judge.note(cases.MEMORY, judge.memory(case))
        assert error <= 1e-4, f"the solution is off by {error:.1e}"
        if result.converged is not None:
            assert judge.numpy(result.converged).all(), (
                f"the solution is right to {error:.1e}, but it says that it failed"
            )

    @several("problem", [*cases.HOPELESS, "budget"])
    def test_success_is_not_claimed_without_a_solution(self, judge: Judge, problem: str) -> None:
        judge.needs("status")
        case = cases.BUDGET if problem == "budget" else cases.HOPELESS[problem]
        what = "at most 5 steps may be taken" if problem == "budget" else "there is no solution"
        result = judge.solve(case, f"{what}, so it must not report success", may_raise=True)
        if result is None:
            return  # an error is an honest end
        z = judge.numpy(result.z)
        done, residual = judge.numpy(result.converged), case.residual(z)
        wrong = done & (~(residual <= GENEROUS * case.rtol) | (problem != "budget"))
        assert not wrong.any(), f"success is reported at z = {z[0].tolist()} with ‖f(z) − z‖/‖f(z)‖ = {residual[0]:.1e}"

    @several("rtol", [1e-2, 1e-4, 1e-8])
    def test_success_means_a_small_residual(self, judge: Judge, rtol: float) -> None:
        judge.needs("status")
        case = replace(cases.SLOW, rtol=rtol)
        result = judge.solve(case, "where it reports success, the residual must be near rtol", may_raise=True)
        if result is None:
            return
        done, residual = judge.numpy(result.converged), case.residual(judge.numpy(result.z))
        assert not (done & ~(residual <= GENEROUS * rtol)).any(), (
            f"success is reported at rtol = {rtol:g} with ‖f(z) − z‖/‖f(z)‖ = {residual[0]:.1e}"
        )

    def test_a_sample_does_not_depend_on_its_batch_mates(self, judge: Judge) -> None:
        judge.needs("batch")
        case = cases.MATES
        together = judge.numpy(judge.solve(case, "the first row must be the same without the second").z)[0]
        alone = judge.numpy(judge.solve(case.alone(0), quiet=True).z)[0]
        change = distance(together, alone)
        assert change <= 1e-9, f"the first sample changes by {change:.1e} with its batch mate, at rtol = {case.rtol:g}"

    def test_nan_in_one_sample_stays_there(self, judge: Judge) -> None:
        judge.needs("batch")
        case = cases.SPOILED
        truth = case.alone(0).truth
        result = judge.solve(case, f"the first row must be {truth[0].round(6).tolist()}")
        actual = judge.numpy(result.z)[0]
        error = distance(actual, truth[0])
        assert error <= 1e-4, f"the healthy sample is {actual.tolist()}, off by {error:.1e}"
        if result.converged is not None:
            done = judge.numpy(result.converged)
            assert not done[1], "the sample with NaN is reported as converged"
            assert done[0], "the healthy sample is right, but it is reported as failed because of its batch mate"

    def test_a_start_at_the_solution_stays(self, judge: Judge) -> None:
        case = replace(cases.LINEAR, z0=[[2.0, 4.0]])
        z = judge.numpy(judge.solve(case, "z0 is the solution").z)
        assert distance(z, case.truth) <= 1e-6, f"from the solution {case.truth.tolist()} it goes to {z.tolist()}"

    def test_a_constant_f_is_solved(self, judge: Judge) -> None:
        case = replace(cases.LINEAR, f="0.0 * z + b")
        z = judge.numpy(judge.solve(case, "the solution is b").z)
        assert distance(z, np.array(case.b)) <= 1e-6, f"f is constant {case.b}, but the result is {z.tolist()}"

    @several("dtype", ["float64", "float32"])
    def test_the_dtype_is_kept(self, judge: Judge, dtype: str) -> None:
        result = judge.solve(replace(cases.LINEAR, dtype=dtype, rtol=1e-4), f"the result must be {dtype}")
        actual = judge.kit.backend.dtype_name(result.z)
        assert actual == dtype, f"z0 is {dtype}, the result {actual}"

    @several("unit", [1e-12, 1e12])
    def test_units_do_not_matter(self, judge: Judge, unit: float) -> None:
        judge.needs("units")
        case = replace(cases.LINEAR, b=[[unit, 2.0 * unit]])
        z = judge.numpy(judge.solve(case, f"the solution is {case.truth.tolist()}").z)
        error = distance(z / unit, case.truth / unit)
        assert error <= 1e-4, f"in units of {unit:g} the solution is off by {error:.1e} of its size"

    @several("problem", ["linear", "curved", "turning", "slow"])
    def test_the_gradient_is_exact(self, judge: Judge, problem: str) -> None:
        judge.needs("gradient")
        case = replace({**cases.EASY, "slow": cases.SLOW}[problem], rtol=1e-9)
        expected = gradient_of(case)
        result = judge.gradient(case, f"the gradient of z*.sum() for b is {expected.round(6).tolist()}")
        error = distance(result, expected)
        assert error <= 1e-3, f"the gradient is {result.tolist()}, off by {100 * error:.2g} %"

    def test_nan_in_one_sample_spoils_no_gradient(self, judge: Judge) -> None:
        judge.needs("gradient")
        judge.needs("batch")
        expected = gradient_of(cases.SPOILED.alone(0))[0]
        result = judge.gradient(cases.SPOILED, f"the first row of the gradient is {expected.round(6).tolist()}")[0]
        assert distance(result, expected) <= 1e-3, f"the gradient of the healthy sample is {result.tolist()}"

    def test_a_second_derivative_is_right_or_refused(self, judge: Judge) -> None:
        """Compare with z'' = f''(z) z'³ for z = tanh(z)/2 + b."""
        judge.needs("gradient")
        case = replace(cases.CURVED, rtol=1e-10)
        t = np.tanh(case.truth)
        expected = -t * (1 - t**2) / (1 - 0.5 * (1 - t**2)) ** 3
        f, z0, b = case.arrays(judge.kit)
        judge.show(case, f"the second derivative for b is {expected.round(6).tolist()}, or an error")
        result, refusal = None, ""
        try:
            result = judge.numpy(judge.solver.second(f, z0, (b,), 0 * z0 + 1, **judge.numbers(case)))
        except Exception as error:
            refusal = f"{type(error).__name__}: {error}"
        if result is None:
            assert "second" not in judge.solver.claims, f"second derivatives are claimed, but {refusal}"
            return
        away = distance(result, expected)
        assert away <= 1e-3, f"the second derivative is {result.tolist()}, off by {100 * away:.2g} %, without an error"

    def test_evaluations_are_those_that_took_place(self, judge: Judge) -> None:
        judge.needs("evaluations")
        calls, result = judge.counted(cases.CURVED, "evaluations must be the calls of f")
        reported = int(np.max(judge.numpy(result.evaluations)))
        assert reported == calls, f"{reported} evaluations are reported, {calls} took place"

    def test_a_budget_is_kept(self, judge: Judge) -> None:
        """Five steps, each of at most n + 2 evaluations for a difference quotient and a search, and a start."""
        calls, _ = judge.counted(cases.BUDGET, "a step may take a few evaluations, but not these", may_raise=True)
        assert calls <= 5 * 4 + 10, f"with max_steps = 5, f is evaluated {calls} times"

    def test_two_solves_agree_to_the_bit(self, judge: Judge) -> None:
        first, again = (judge.numpy(judge.solve(cases.CURVED, "run it twice").z) for _ in range(2))
        assert np.array_equal(first, again), f"two equal solves differ by {distance(first, again):.1e}"

    def test_its_arguments_are_left_alone(self, judge: Judge) -> None:
        f, z0, b = cases.CURVED.arrays(judge.kit)
        judge.show(cases.CURVED, "z0 and b must not change")
        judge.solver.solve(f, z0, (b,), **judge.numbers(cases.CURVED))
        assert np.array_equal(judge.numpy(z0), np.array(cases.CURVED.z0)), "a solve wrote into z0"
        assert np.array_equal(judge.numpy(b), np.array(cases.CURVED.b)), "a solve wrote into its arguments"

    def test_it_prints_and_plots_nothing(self, judge: Judge, capfd: Any) -> None:
        judge.solve(cases.CURVED, "nothing may be printed or plotted")
        result = shown(capfd)
        assert not result, result

    def test_settings_of_the_process_are_left_alone(self, judge: Judge) -> None:
        """Let the fixture compare the settings of Python, NumPy and the framework with those before the solve."""
        streams = sys.stdout, sys.stderr  # pytest sets these again before the fixture ends
        judge.solve(cases.CURVED, "settings of the process must not change")
        kept = (sys.stdout, sys.stderr) == streams
        sys.stdout, sys.stderr = streams
        assert kept, "a solve replaced sys.stdout or sys.stderr"
        if "gradient" in judge.solver.claims:
            judge.gradient(cases.CURVED, "settings of the process must not change")


class Judge:
    """Runs cases on an adapter, and notes the code of the latest for the report."""

    def __init__(self, kit: Kit, solver: ExternalSolver, name: str, note: Callable[[str, object], None]) -> None:
        self.kit, self.solver, self.name, self.note = kit, solver, name, note
        self.numpy: Callable[[Any], Any] = lambda x: np.asarray(x) if isinstance(x, int) else kit.numpy(x)

    def needs(self, claim: str) -> None:
        """Skip what the library does not promise."""
        if claim not in self.solver.claims:
            pytest.skip(f"{CLAIM}{CLAIMS[claim]}")

    def show(self, case: Case, comment: str) -> None:
        """Note the case for the report."""
        self.note("code", case.text(self.name, after=f"# {comment}"))

    def numbers(self, case: Case) -> dict[str, Any]:
        """Tolerance and budget."""
        return {"rtol": case.rtol, "max_steps": case.max_steps}

    def solve(self, case: Case, comment: str = "", *, may_raise: bool = False, quiet: bool = False) -> Any:
        """Return the checked `ExternalResult`, or None if it raised and may do so."""
        f, z0, b = case.arrays(self.kit)
        if not quiet:
            self.show(case, comment)
        try:
            result = self.solver.solve(f, z0, (b,), **self.numbers(case))
        except Exception:
            if may_raise:
                return None
            raise
        self._check(result, case)
        return result

    def _check(self, result: Any, case: Case) -> None:
        assert isinstance(result, ExternalResult), f"solve must return an ExternalResult (got {type(result).__name__})"
        for claim, value in (("status", result.converged), ("evaluations", result.evaluations)):
            assert value is not None or claim not in self.solver.claims, f"{claim} is claimed, but the result has none"
        shape, (batch, n) = np.shape(self.numpy(result.z)), np.shape(case.z0)
        assert shape == (batch, n), f"z must have the shape of z0, ({batch}, {n}) (got {shape})"
        if result.converged is not None:
            shape = self.numpy(result.converged).shape
            assert shape == (batch,), f"converged must have the shape ({batch},) (got {shape})"
        if result.evaluations is not None:
            given = result.evaluations
            counts = self.numpy(given) if self.kit.backend.is_array(given) else np.asarray(given)
            fits = counts.dtype.kind in "iu" and counts.shape in ((), (batch,))
            assert fits, f"evaluations must be an integer, or an array of integers ({batch},) (got {given!r:.80})"

    def memory(self, case: Case) -> float | str:
        """Return how many states a solve holds at once; a solve that the measurement cannot run is not to blame."""
        try:
            (few, one), (many, two) = (self._peak(case, size) for size in cases.SIZES)
        except Exception as error:
            return f"not measured: {type(error).__name__}"
        return round((many - few) / (two - one), 1)

    def _peak(self, case: Case, size: int) -> tuple[int, int]:
        """Return the bytes that a solve holds at most, and those of its state, if that has `size` numbers."""
        row = [(case.b[0] * size)[:size]]
        f, z0, b = replace(case, z0=[[0.0] * size], b=row).arrays(self.kit)

        def solve(z0: Any, b: Any) -> Any:
            return self.solver.solve(f, z0, (b,), **self.numbers(case))[0]

        solve(z0, b)  # imports and caches do not count
        return self.kit.backend.harness.peak_memory(solve, z0, b), size * self.kit.numpy(z0).itemsize

    def gradient(self, case: Case, comment: str) -> Any:
        """Return the gradient of z*.sum() for b, in NumPy."""
        f, z0, b = case.arrays(self.kit)
        self.show(case, comment)
        (gradient,) = self.solver.gradient(f, z0, (b,), 0 * z0 + 1, **self.numbers(case))
        return self.numpy(gradient)

    def counted(self, case: Case, comment: str, *, may_raise: bool = False) -> tuple[int, Any]:
        """Return how often f was called for a case of one sample, and the result."""
        if not self.kit.eager:
            pytest.skip("traced code calls f once, whatever it runs")
        calls, (f, z0, b) = [0], case.arrays(self.kit)
        self.show(case, comment)

        def counting(z: Any, b: Any) -> Any:
            calls[0] += 1
            return f(z, b)

        try:
            result: Any = self.solver.solve(counting, z0, (b,), **self.numbers(case))
        except Exception:
            if not may_raise:
                raise
            return calls[0], None
        self._check(result, case)
        return calls[0], result


def distance(result: Any, expected: Any) -> float:
    """Return ‖found − expected‖ / ‖expected‖, and inf where a number is missing."""
    result, expected = np.asarray(result, float), np.asarray(expected, float)
    size = float(np.linalg.norm(expected))
    away = float(np.linalg.norm(result - expected))
    return away / size if np.isfinite(away) and size > 0 else away if np.isfinite(away) else float("inf")


def gradient_of(case: Case) -> Any:
    """Return the gradient of z*.sum() for b by central differences of the true solution, row by row."""
    h, expected = 1e-6, np.zeros(np.shape(case.b))
    for i in range(expected.shape[1]):
        shift = np.zeros(expected.shape)
        shift[:, i] = h
        up, down = (replace(case, b=(np.array(case.b) + sign * shift).tolist()).truth.sum(axis=1) for sign in (1, -1))
        expected[:, i] = (up - down) / (2 * h)
    return expected
