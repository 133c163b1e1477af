"""What `Strategy.solve_adjoint` must keep, with Jacobians that are known."""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

import numpy as np
import pytest

from deqcore import plugins
from deqcore.abc.backward import StepStrategy, Strategy
from deqcore.options import option_values
from deqcore.solve.messages import BUDGETS
from deqcore.solve.verification import random_halves, verified
from deqcore.testing.suite.base import DTYPES, Conformance, several
from deqcore.testing.suite.fixtures import Affine, DenseEstimate, Kit, affine, close
from deqcore.testing.suite.import_cost import check_light
from deqcore.testing.suite.scales import scales
from deqcore.testing.suite.strategy.equations import (
    FLAT,
    cotangent,
    hidden,
    perfect,
    singular,
    slow,
    solve_adjoint,
    unlike,
)
from deqcore.types import AdjointReport, Array, Status


class AdjointTests(Conformance):
    """Only for a `Strategy`; a `StepStrategy` has tests of its own."""

    def test_is_a_frozen_dataclass_of_options(self, kit: Kit, any_strategy: Strategy | StepStrategy) -> None:
        assert dataclasses.is_dataclass(type(any_strategy)), "options are fields of a dataclass"
        assert hash(any_strategy) == hash(copy.copy(any_strategy)), "compiled code is cached by the strategy"
        if isinstance(any_strategy, Strategy):
            assert any_strategy.needs in ("nothing", "vjp", "estimate"), (
                "`needs` must be 'nothing', 'vjp' or 'estimate'."
            )

    def test_it_imports_no_framework(self, kit: Kit, strategy_name: str) -> None:
        check_light("strategy", strategy_name)

    def test_where_f_is_flat_the_cotangent_is_the_answer(self, kit: Kit, strategy: Strategy) -> None:
        u, _ = solve_adjoint(kit, strategy, Affine(np.zeros((3, 6, 6)), np.zeros((3, 6))), cotangent())
        close(u, cotangent(), 1e-5, "u for J = 0")

    @several("dtype", DTYPES)
    def test_the_units_of_the_cotangent_change_nothing(self, kit: Kit, strategy: Strategy, dtype: str) -> None:
        """u is linear in g, also where the square of g vanishes or overflows."""
        problem, g, s = affine(norm=0.7), cotangent(), scales(3, dtype)[:, None]
        u, report = solve_adjoint(kit, strategy, problem, g, dtype=dtype)
        moved, report_there = solve_adjoint(kit, strategy, problem, g * s, dtype=dtype)
        close(moved / s, u, 1e-5 if dtype == "float32" else 1e-12, "u in units of g")
        for name in ("status", "vjps", "fallback"):
            one, other = getattr(report, name), getattr(report_there, name)
            assert np.array_equal(one, other), f"{name} is {other} in other units, but {one} is due"
        for name in ("residual", "error"):
            one, other = np.nan_to_num(getattr(report, name)), np.nan_to_num(getattr(report_there, name))
            close(other, one, 1e-5, f"{name} in other units")

    @several("seed", range(3))
    def test_an_exact_strategy_solves_the_adjoint_equation(
        self, kit: Kit, strategy_name: str, strategy: Strategy, tight: Any, seed: int
    ) -> None:
        if not strategy.exact:
            pytest.skip("the strategy approximates")
        sharp = plugins.make_strategy(strategy_name, tight)
        assert isinstance(sharp, Strategy), "the strategy with a smaller tolerance must still be a Strategy."
        problem, g = affine(norm=(0.7, 0.95, 3.0)[seed], seed=seed), cotangent(seed)
        u, report = solve_adjoint(kit, sharp.bind(plugins.make_solver), problem, g)
        expected = problem.adjoint(g)
        inverse = np.linalg.norm(np.linalg.inv(np.eye(6) - problem.a), 2, axis=(1, 2)).max()
        promised = option_values(sharp).get("rtol")
        allowed = max(1e-9 if kit.eps < 1e-10 else 1e-3, 4 * promised if isinstance(promised, float) else 0.0)
        close(u, expected, allowed * inverse, "u = (I − J)^-T g")
        assert (report.status == int(Status.CONVERGED)).all(), (
            "an exact strategy must solve a contracting adjoint equation. Raise its budget, or set exact = False."
        )

    def test_a_perfect_estimate_gives_the_perfect_gradient(self, kit: Kit, strategy: Strategy) -> None:
        if not strategy.wants_estimate():
            pytest.skip("the strategy reads no estimate")
        problem, g = affine(norm=0.9), cotangent()
        u, report = solve_adjoint(kit, strategy, problem, g, perfect(problem))
        slack = 1e-6 if kit.eps < 1e-10 else 1e-3
        target = getattr(strategy, "max_relative_error", None)
        if isinstance(target, float) and getattr(strategy, "reuse", None) == "witness":
            # The estimate judges u and is not in it. What it says of a residual is the error itself.
            error = np.linalg.norm(u - problem.adjoint(g), axis=1) / np.linalg.norm(problem.adjoint(g), axis=1)
            assert (error <= report.error + slack).all(), (
                f"a perfect witness hears errors {report.error}, but they are {error}"
            )
            return
        close(u, problem.adjoint(g), slack, "u = −Hᵀg with H = (J − I)^-1")
        assert report.vjps.max() <= 1, "a perfect estimate needs one vjp to be certified, and none to be used"
        estimated = report.error[np.isfinite(report.error)]
        assert (estimated <= 1e3 * slack).all(), f"u is perfect, but errors {report.error} are estimated"

    def test_it_is_no_worse_than_the_bare_cotangent(self, kit: Kit, strategy: Strategy) -> None:
        problem, g = affine(norm=0.3), cotangent()
        u, _ = solve_adjoint(kit, strategy, problem, g, perfect(affine(norm=0.3, seed=5)))  # an estimate of another J
        u2, _ = solve_adjoint(kit, strategy, problem, g)  # H = −I
        for result in (u, u2) if strategy.uses_vjp() else (u2,):
            limit = 1.8 if not strategy.uses_vjp() else 0.6
            assert (problem.residual(result, g) <= limit).all(), "a worthless estimate must not be trusted blindly"
        assert (problem.residual(u2, g) <= 0.3 + 1e-6).all(), "‖g + Jᵀu − u‖ is above that of u = g"

    def test_the_report_is_true(self, kit: Kit, strategy: Strategy) -> None:
        problem, g = affine(norm=0.95), cotangent()
        for estimate in (None, perfect(problem), perfect(affine(norm=0.7, seed=3))):
            self._true(kit, problem, g, *solve_adjoint(kit, strategy, problem, g, estimate))

    def _true(self, kit: Kit, problem: Affine, g: Any, u: Any, report: AdjointReport) -> None:
        assert [each.shape for each in report] == [(3,)] * len(report), (
            "every field of the report must have the shape (batch,)."
        )
        assert report.status.dtype == report.vjps.dtype == np.int32, "status and vjps of the report must be int32."
        assert report.fallback.dtype == bool, "fallback of the report must be bool."
        assert set(report.status) <= {int(code) for code in Status if code is not Status.RUNNING}, (
            "the report must hold final statuses only. RUNNING must not be left."
        )
        assert not (report.status == int(Status.NONFINITE)).any(), "NONFINITE, but everything is finite"
        true = problem.residual(u.astype(float), g)
        known = np.isfinite(report.residual)
        slack = 1e-6 if kit.eps < 1e-10 else 1e-3
        assert (np.abs(report.residual - true)[known] <= slack + 1e-3 * true[known]).all(), (
            f"residuals {report.residual} are reported, but ‖g + Jᵀu − u‖/‖g‖ is {true}"
        )
        exact = problem.adjoint(g)
        error = np.linalg.norm(u - exact, axis=1) / np.linalg.norm(exact, axis=1)
        estimated = np.isfinite(report.error)
        assert (error[estimated] <= 3 * report.error[estimated] + slack).all(), (
            f"errors {report.error} are estimated, but they are {error}"
        )

    def test_rows_that_f_couples_are_reported(self, kit: Kit, strategy: Strategy) -> None:
        """Check a report after `backward.verify_every`: a measured residual, and no false CONVERGED."""
        if not strategy.uses_vjp():
            pytest.skip("the strategy uses no products, so nothing can be measured")
        backend, g = kit.backend, cotangent()
        given = [kit.array(g)] + [kit.array(FLAT)] * strategy.wants_estimate()

        def vjp(u: Array) -> Array:  # f(z)[i] = 0.6 z[i − 1] + …
            return 0.6 * backend.xp.concat([u[1:], u[:1]], axis=0)

        def solved(g: Array, *h: Array) -> Any:
            u, report = strategy.solve_adjoint(backend, vjp, g, DenseEstimate(kit, *h) if h else None)
            return u, report, verified(backend, strategy, vjp, g, u, report, random_halves(3, 6, seed=0))

        with backend.errstate():
            u, report, true = backend.harness.jit(solved)(*given)
        u, status, residual = kit.numpy(u).astype(float), kit.numpy(true.status), kit.numpy(true.residual)
        left = np.linalg.norm(g + 0.6 * np.roll(u, -1, axis=0) - u, axis=1) / np.linalg.norm(g, axis=1)
        assert kit.numpy(true.coupling).max() > 0, "f couples rows, but the report does not say so"
        assert np.array_equal(kit.numpy(true.vjps), kit.numpy(report.vjps)), "verification is counted apart"
        assert (kit.numpy(true.verify_vjps) > 0).all(), "verification is counted apart"
        close(residual, left, 1e-6, "‖g + Jᵀu − u‖/‖g‖")
        if strategy.exact:
            wrong = left > 0.01
            assert not (status[wrong] == int(Status.CONVERGED)).any(), (
                f"rows are coupled, and the status is CONVERGED with residuals of {left}"
            )
        assert np.isnan(kit.numpy(true.error)).all(), "an estimate of the error assumes that rows are independent"

    def test_converged_means_what_the_options_promise(self, kit: Kit, strategy: Strategy) -> None:
        """Check that `rtol` bounds the adjoint residual, and `max_relative_error` the estimated error."""
        target, rtol = (option_values(strategy).get(name) for name in ("max_relative_error", "rtol"))
        if not isinstance(target, float) and not isinstance(rtol, float):
            pytest.skip("the options promise no accuracy")
        for problem, g in ((affine(norm=0.8), cotangent()), (slow(), cotangent()), hidden()):
            self._promised(kit, strategy, problem, g, target, rtol)

    def _promised(self, kit: Kit, strategy: Strategy, problem: Affine, g: Any, target: Any, rtol: Any) -> None:
        exact = problem.adjoint(g)
        n = g.shape[1]
        for estimate in (None, *(perfect(affine(n=n, norm=norm, seed=3)) for norm in (0.7, 3.0))):
            u, report = solve_adjoint(kit, strategy, problem, g, estimate)
            done = (report.status == int(Status.CONVERGED)) & ~report.fallback
            error = np.linalg.norm(u - exact, axis=1) / np.linalg.norm(exact, axis=1)
            if isinstance(target, float):
                assert (error[done] <= 3 * target).all(), f"CONVERGED with a target of {target}, but off by {error}"
            if isinstance(rtol, float):
                left = problem.residual(u, g)
                assert (left[done] <= 1.01 * rtol + 1e3 * kit.eps).all(), f"CONVERGED at rtol = {rtol} with {left}"

    def test_a_promise_is_kept_where_that_is_easy(self, kit: Kit, strategy: Strategy) -> None:
        """Require that `max_relative_error` is met where f contracts strongly."""
        if not isinstance(option_values(strategy).get("max_relative_error"), float) or self._budget(strategy)[1] < 6:
            pytest.skip("the options promise no accuracy, or leave no budget for it")
        _, report = solve_adjoint(kit, strategy, affine(norm=0.3), cotangent())
        assert (report.status == int(Status.CONVERGED)).all(), f"statuses {report.status}"
        assert not report.fallback.any(), (
            "the fallback must not be needed where the problem is easy. Check the test that starts it."
        )

    def test_as_many_vjps_as_dimensions_are_enough(self, kit: Kit, strategy: Strategy) -> None:
        """Solve n equations with a budget of n vjps: each vjp must add a new direction."""
        name, _ = self._budget(strategy)
        if name != "max_refine_vjps" or not isinstance(option_values(strategy).get("max_relative_error"), float):
            pytest.skip("the strategy refines nothing")
        whole = dataclasses.replace(strategy, max_refine_vjps=16, max_relative_error=1e-3)  # type: ignore[type-var]
        for problem, g in (hidden(), unlike()):
            u, report = solve_adjoint(kit, whole, problem, g)
            close(u, problem.adjoint(g), 1e-2, "u after as many vjps as there are dimensions")
            assert (report.status == int(Status.CONVERGED)).all(), f"statuses {report.status}, {report.vjps} vjps"

    def test_a_budget_is_kept(self, kit: Kit, strategy: Strategy) -> None:
        name, _ = self._budget(strategy)
        if not name:
            pytest.skip("the strategy has no budget")
        for budget, (problem, g) in ((2, (affine(norm=0.95), cotangent())), (4, unlike())):
            short = dataclasses.replace(strategy, **{name: budget})  # type: ignore[type-var]
            _, report = solve_adjoint(kit, short, problem, g)
            most = 2 * budget if option_values(strategy).get("fallback", "none") == "exact-ift" else budget
            assert report.vjps.max() <= most + 1, f"{report.vjps} vjps for {name} = {budget}"

    def _budget(self, strategy: Strategy) -> tuple[str, int]:
        options = option_values(strategy)
        result: tuple[str, object] = next(((name, options[name]) for name in BUDGETS if name in options), ("", 0))
        return result[0], result[1] if isinstance(result[1], int) else sys.maxsize  # "auto" is not a small budget

    def test_a_fallback_is_reported(self, kit: Kit, strategy: Strategy) -> None:
        g = cotangent()
        if option_values(strategy).get("fallback") != "jacobian-free":
            _, report = solve_adjoint(kit, strategy, affine(norm=3.0), g)
            assert option_values(strategy).get("fallback", "none") != "none" or not report.fallback.any(), (
                "fallback must be false in the report of a strategy whose fallback is 'none'."
            )
            return
        for norm in (0.3, 0.95, 3.0):
            problem = affine(norm=norm)
            u, report = solve_adjoint(kit, strategy, problem, g, perfect(affine(norm=3.0, seed=4)))
            assert (problem.residual(u, g) <= 1.001 * problem.residual(g, g) + 1e-6).all(), "worse than u = g"
            assert np.isnan(report.error[report.fallback]).all(), "the error of a fallback must be NaN"
            assert np.isfinite(report.error[~report.fallback]).all() or strategy.wants_estimate() is False, (
                "a strategy that uses an estimate must report its error where it did not fall back."
            )
            same = (np.abs(u - g) <= 1e-6 * np.abs(g)).all(axis=1)
            assert list(report.fallback) == list(same), f"fallback {report.fallback}, but u is g in {same}"
            done = report.status == int(Status.CONVERGED)
            assert not (report.fallback & done).any(), "what was replaced has not converged"

    def test_vjps_are_counted(self, kit: Kit, strategy: Strategy) -> None:
        if not kit.eager:
            pytest.skip("a traced loop calls vjp once, whatever it runs")
        problem, calls = affine(batch=1, norm=0.8), []  # of several samples each may spend its own number
        vjp = kit.vjp(kit.array(problem.a))
        h = kit.array(perfect(affine(batch=1, norm=0.7, seed=3)))
        estimate = DenseEstimate(kit, h) if strategy.wants_estimate() else None

        def counted(u: Array) -> Array:
            calls.append(u)
            return vjp(u)

        _, report = strategy.solve_adjoint(kit.backend, counted, kit.array(cotangent()[:1]), estimate)
        spent = int(kit.numpy(report.vjps)[0])
        assert spent == len(calls), f"{spent} vjps are reported, but vjp was called {len(calls)} times"

    def test_a_budget_that_is_too_small_is_reported(self, kit: Kit, strategy_name: str, strategy: Strategy) -> None:
        if not strategy.exact or "max_steps" not in option_values(strategy):
            pytest.skip("the strategy has no budget of steps")
        short = dataclasses.replace(strategy, max_steps=2)  # type: ignore[type-var]
        problem, g = affine(norm=0.95), cotangent()
        u, report = solve_adjoint(kit, short, problem, g)
        wrong = problem.residual(u, g) > 1e-3
        assert wrong.any(), "two steps cannot solve this"
        assert not (report.status[wrong] == int(Status.CONVERGED)).any(), "CONVERGED, but the equation is not solved"
        assert (report.status[wrong] == int(Status.MAX_STEPS)).all(), "a budget that ran out is MAX_STEPS"

    def test_an_equation_without_solution_is_reported(self, kit: Kit, strategy: Strategy) -> None:
        if not strategy.exact:
            pytest.skip("the strategy approximates")
        problem = affine()
        problem.a[1] = np.eye(6)  # I − Jᵀ = 0
        _, report = solve_adjoint(kit, strategy, problem, cotangent())
        assert report.status[1] != int(Status.CONVERGED), (
            "an equation without solution must not be reported as CONVERGED. Measure the residual before the "
            "status is set."
        )
        assert (report.status[[0, 2]] == int(Status.CONVERGED)).all(), (
            "a sample without solution must not change the status of its neighbours. Use one set of "
            "coefficients for each sample."
        )
        problem, g = singular()
        u, report = solve_adjoint(kit, strategy, problem, g)
        left = problem.residual(u, g)[1]
        assert report.status[1] != int(Status.CONVERGED), f"CONVERGED without a solution: ‖g + Jᵀu − u‖/‖g‖ = {left}"

    @several("harm", [np.nan, np.inf])
    def test_a_bad_sample_changes_no_bit_of_its_neighbours(self, kit: Kit, strategy: Strategy, harm: float) -> None:
        problem, g = affine(), cotangent()
        bad = g.copy()
        bad[1] = harm
        one, two = (solve_adjoint(kit, strategy, problem, each) for each in (g, bad))
        assert np.array_equal(one[0][[0, 2]], two[0][[0, 2]]), "u of a healthy sample depends on its neighbour"
        for name, a, b in zip(AdjointReport._fields, one[1], two[1], strict=True):
            assert np.array_equal(a[[0, 2]], b[[0, 2]], equal_nan=a.dtype.kind == "f"), f"report.{name}"
        if strategy.exact:
            assert two[1].status[1] != int(Status.CONVERGED), "a cotangent that is not finite has no answer"
        if np.isfinite(one[1].residual).all():
            assert two[1].status[1] == int(Status.NONFINITE), "what is measured and not finite is NONFINITE"

    @several("harm", [np.nan, np.inf])
    def test_a_cotangent_that_is_not_finite_stays_visible(self, kit: Kit, strategy: Strategy, harm: float) -> None:
        """Require NaN, alone and in a batch: a zero would hide an overflow from a gradient scaler."""
        problem, bad = affine(), cotangent()
        bad[1] = harm
        for rows in (slice(None), slice(1, 2)):
            u, _ = solve_adjoint(kit, strategy, Affine(problem.a[rows], problem.b[rows]), bad[rows])
            assert not np.isfinite(u[-2 if len(u) > 1 else 0]).all(), "u is finite for a cotangent that is not"

    def test_a_sample_is_routed_in_a_batch_as_alone(self, kit: Kit, strategy: Strategy) -> None:
        problem, g = affine(norm=0.8), cotangent()
        problem.a[0] *= 0.1
        together, report = solve_adjoint(kit, strategy, problem, g)
        slack = 1e-6 if kit.eps < 1e-10 else 1e-3
        for i in range(3):
            alone, own = solve_adjoint(kit, strategy, Affine(problem.a[i : i + 1], problem.b[i : i + 1]), g[i : i + 1])
            close(together[i], alone[0], slack, f"u of sample {i}")
            for name, a, b in zip(AdjointReport._fields, report, own, strict=True):
                assert np.allclose(a[i], b[0], rtol=slack, atol=slack, equal_nan=True), f"{name} of sample {i}"

    def test_an_empty_batch_has_an_empty_answer(self, kit: Kit, strategy: Strategy) -> None:
        if not kit.eager:
            pytest.skip("a batch of another size is another program")
        u, report = solve_adjoint(kit, strategy, affine(batch=0), np.zeros((0, 6)), np.zeros((0, 6, 6)))
        assert u.shape == (0, 6), f"u of no samples must have the shape (0, 6) (got {u.shape})"
        shapes = {each.shape for each in report}
        assert shapes == {(0,)}, f"every field of the report must have the shape (0,) (got {shapes})"

    def test_a_cotangent_of_zero_gives_zero(self, kit: Kit, strategy: Strategy) -> None:
        g = cotangent()
        g[1] = 0.0
        u, report = solve_adjoint(kit, strategy, affine(), g)
        assert not u[1].any(), "a cotangent of 0 must give u = 0 in its sample."
        assert np.isfinite(u).all(), "a cotangent of 0 must not make u NaN. Guard divisions by its norm."
        if np.isfinite(report.residual[[0, 2]]).all():
            assert report.residual[1] == 0.0, "zero solves g + Jᵀu = u for g = 0, and that is measured elsewhere"
        if strategy.exact:
            assert report.status[1] == int(Status.CONVERGED), "zero solves g + Jᵀu = u for g = 0"
        u, report = solve_adjoint(kit, strategy, affine(), 0 * g)
        assert not u.any(), "cotangents of 0 in all samples must give u = 0."
        assert not (report.residual < 0.0).any(), "a residual is a norm"

    @several("factor", [1e-6, 1e6])
    def test_the_scale_of_the_loss_does_not_matter(self, kit: Kit, strategy: Strategy, factor: float) -> None:
        problem, g = affine(norm=0.8), cotangent()
        plain, one = solve_adjoint(kit, strategy, problem, g)
        scaled, two = solve_adjoint(kit, strategy, problem, factor * g)
        close(scaled / factor, plain, 1e-5 if kit.eps < 1e-10 else 1e-2, "u for a scaled loss")
        assert np.array_equal(one.vjps, two.vjps), (
            "scaling the loss must not change the number of vjps. Compare residuals with the norm of g, not "
            "with a constant."
        )
        assert np.array_equal(one.status, two.status), "the status depends on the scale of the loss"
        for name, a, b in (("residual", one.residual, two.residual), ("error", one.error, two.error)):
            assert np.allclose(a, b, rtol=1e-2, atol=1e-3, equal_nan=True), f"{name}: {a}, and {b} for a scaled loss"

    @several("dtype", DTYPES)
    def test_dtypes_are_kept(self, kit: Kit, strategy: Strategy, dtype: str) -> None:
        u, _ = solve_adjoint(kit, strategy, affine(norm=0.3), cotangent(), dtype=dtype)
        assert np.isfinite(u).all(), "u must be finite in every dtype. Compute norms in the accumulating dtype."
