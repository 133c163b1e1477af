"""Cost bounds of a strategy, and estimates of its error where they are hard to make."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest

from deqcore.abc.backward import Strategy
from deqcore.linear.norms import default_rtol
from deqcore.options import option_values
from deqcore.testing.problems import golden, names, raveled
from deqcore.testing.suite.base import Conformance, claimed, several
from deqcore.testing.suite.fixtures import Affine, Kit, close
from deqcore.testing.suite.strategy.equations import solve_adjoint, unlike
from deqcore.types import AdjointReport, Array, Status


def adjoint_of(name: str) -> tuple[Affine, Any, Any]:
    """J at the z* of a golden problem, g and u = (I − J)^-T g, of its healthy samples."""
    known = golden(name)
    truth, healthy = known.truth, known.truth.healthy
    g = raveled(known.problem.direction(), len(healthy))[healthy]
    u = truth.gradients["cotangent"]
    u = u[healthy] if len(u) == len(healthy) else u
    return Affine(truth.jacobian, np.zeros(g.shape)), g, u


def half_right() -> tuple[Affine, Any, Any]:
    """Make a problem, its cotangent, and an estimate that is right except for a tenth of one slow mode."""
    rng = np.random.default_rng(15)
    q, _ = np.linalg.qr(rng.standard_normal((3, 16, 16)))
    modes = np.array([0.99, *rng.uniform(-0.3, 0.3, 15)])
    weights = np.array([0.05, *rng.standard_normal(15)])
    inverse = 1.0 / (1.0 - modes)
    inverse[0] *= 0.1
    turned = q.swapaxes(1, 2)
    return Affine(q @ np.diag(modes) @ turned, np.zeros((3, 16))), q @ weights, -(q @ np.diag(inverse) @ turned)


def hardly_shown(n: int = 16, share: float = 0.05) -> tuple[Affine, Any, Any]:
    """Make modes of 0.3 and one of 0.999, with a twentieth of the cotangent, which the estimate does not contain."""
    rng = np.random.default_rng(21)
    q, _ = np.linalg.qr(rng.standard_normal((3, n, n)))
    modes, known = np.full(n, 0.3), np.full(n, 1 / 0.7)
    modes[0], known[0] = 0.999, 1.0
    weights = rng.standard_normal((3, n))
    weights[:, 0] = share * np.linalg.norm(weights[:, 1:], axis=1) / np.sqrt(1 - share**2)
    turned = q.swapaxes(1, 2)
    g = np.einsum("bij,bj->bi", q, weights)
    return Affine(q @ np.diag(modes) @ turned, np.zeros((3, n))), g, -(q @ np.diag(known) @ turned)


def hard_symmetric(n: int = 96) -> tuple[Affine, Any]:
    """Symmetric, with eigenvalues from .3 to .9999: forty products are not enough."""
    rng = np.random.default_rng(22)
    q, _ = np.linalg.qr(rng.standard_normal((3, n, n)))
    problem = Affine(q @ np.diag(np.linspace(0.3, 0.9999, n)) @ q.swapaxes(1, 2), np.zeros((3, n)))
    return problem, rng.standard_normal((3, n))


class ClaimTests(Conformance):
    """Only for a `Strategy`."""

    cost_bounds: ClassVar[Mapping[str, int] | None] = None

    @several("problem", names())
    def test_a_claim_is_kept(
        self, request: Any, kit: Kit, strategy: Strategy, settings: Mapping[str, object], problem: str
    ) -> None:
        """Solve the adjoint equation of a golden problem within the claimed vjps."""
        cost_bounds = claimed(request.config, self.cost_bounds, strategy, settings)
        if problem not in cost_bounds:
            pytest.skip("the strategy has no cost bound here")
        if not kit.backend.capabilities.float64:
            pytest.skip("cost_bounds are made for double precision")
        known, g, expected = adjoint_of(problem)
        u, report = solve_adjoint(kit, strategy, known, g)
        assert (report.status == int(Status.CONVERGED)).all(), f"statuses {report.status}"
        assert report.vjps.max() <= cost_bounds[problem], (
            f"{report.vjps} vjps; at most {cost_bounds[problem]} are claimed"
        )
        if strategy.exact:
            error = np.linalg.norm(u - expected, axis=1) / np.linalg.norm(expected, axis=1)
            size = np.linalg.norm(g, axis=1) / np.linalg.norm(expected, axis=1)
            inverse = np.linalg.norm(np.linalg.inv(np.eye(g.shape[1]) - known.a), 2, axis=(1, 2))
            assert (error <= 1.01 * report.residual * size * inverse + 1e-12 * inverse).all(), (
                f"u is off by {error}, more than residuals of {report.residual} explain"
            )

    def test_directions_stay_independent_where_that_is_hard(
        self, request: Any, kit: Kit, strategy: Strategy, settings: Mapping[str, object]
    ) -> None:
        """Check at a condition of 1e6 that a cost bound of as many vjps as dimensions holds."""
        cost_bounds, n = claimed(request.config, self.cost_bounds, strategy, settings), 24
        if cost_bounds.get("ill-conditioned", n) > golden("ill-conditioned").truth.jacobian.shape[1]:
            pytest.skip("the strategy has no cost bound of as many vjps as dimensions")
        if not kit.backend.capabilities.float64:
            pytest.skip("cost_bounds are made for double precision")
        rng = np.random.default_rng(19)
        left, right = np.linalg.qr(rng.standard_normal((2, 3, n, n)))[0]
        problem = Affine(np.eye(n) - left @ np.diag(np.logspace(0, -6, n)) @ right, np.zeros((3, n)))
        g = rng.standard_normal((3, n))
        sharp = dataclasses.replace(strategy, rtol=1e-8) if hasattr(strategy, "rtol") else strategy  # type: ignore[type-var]
        u, report = solve_adjoint(kit, sharp, problem, g)
        assert (report.status == int(Status.CONVERGED)).all(), f"statuses {report.status} after {report.vjps} vjps"
        assert report.vjps.max() <= n + 1, f"{report.vjps} vjps for {n} dimensions"
        assert (problem.residual(u, g) <= 1.01e-8).all(), f"residuals of {problem.residual(u, g)}"

    def test_claims_are_golden_problems(self, kit: Kit, strategy: Strategy) -> None:
        assert isinstance(strategy.cost_bounds, Mapping), (
            f"cost_bounds must be {{problem: vjps}} (got {strategy.cost_bounds})"
        )
        assert set(strategy.cost_bounds) <= set(names()), (
            f"cost_bounds must name golden problems only: {sorted(set(strategy.cost_bounds) - set(names()))} "
            "are unknown."
        )

    def test_unlike_samples_are_routed_as_alone(self, kit: Kit, strategy: Strategy) -> None:
        """Compare samples with their solves alone, though one ends after a vjp or two and the others much later."""
        problem, g = unlike()
        together, report = solve_adjoint(kit, strategy, problem, g)
        slack = 1e-6 if kit.eps < 1e-10 else 1e-2
        for i in range(3) if kit.eager else (0,):
            one = slice(i, i + 1)
            alone, own = solve_adjoint(kit, strategy, Affine(problem.a[one], problem.b[one]), g[one])
            close(together[one], alone, slack, f"u of sample {i}")
            for name, a, b in zip(AdjointReport._fields, report, own, strict=True):
                assert np.allclose(a[i], b[0], rtol=1e3 * slack, atol=slack, equal_nan=True), (
                    f"{name} of sample {i}: {a[i]} in the batch, {b[0]} alone"
                )

    def test_the_error_of_a_half_right_estimate_is_not_hidden(self, kit: Kit, strategy: Strategy) -> None:
        """Good in the mean and bad in the one direction that u is mostly of."""
        if not strategy.wants_estimate() or not isinstance(option_values(strategy).get("max_relative_error"), float):
            pytest.skip("the strategy reads no estimate, or promises no accuracy")
        problem, g, h = half_right()
        u, report = solve_adjoint(kit, strategy, problem, g, h)
        exact = problem.adjoint(g)
        error = np.linalg.norm(u - exact, axis=1) / np.linalg.norm(exact, axis=1)
        estimated = np.isfinite(report.error)
        assert (error <= 3 * report.error + 1e-6)[estimated].all(), f"estimated {report.error}, true {error}"

    def test_a_mode_that_the_cotangent_hardly_shows_is_met(self, kit: Kit, strategy: Strategy) -> None:
        """Check the error where one product gives a small residual and hides the mode that dominates u."""
        target = option_values(strategy).get("max_relative_error")
        if not isinstance(target, float):
            pytest.skip("the options promise no accuracy")
        problem, g, known = hardly_shown()
        exact = problem.adjoint(g)
        for estimate in (None, known) if strategy.wants_estimate() else (None,):
            u, report = solve_adjoint(kit, strategy, problem, g, estimate)
            done = (report.status == int(Status.CONVERGED)) & ~report.fallback
            error = np.linalg.norm(u - exact, axis=1) / np.linalg.norm(exact, axis=1)
            assert (error[done] <= 3 * target).all(), (
                f"CONVERGED with a target of {target} after {report.vjps} vjps, but off by {error}"
            )

    def test_a_hard_equation_is_solved_or_reported(self, kit: Kit, strategy: Strategy) -> None:
        """Require that an exact strategy with an automatic budget solves small systems of any condition."""
        if not strategy.exact:
            pytest.skip("the strategy approximates")
        problem, g = hard_symmetric()
        u, report = solve_adjoint(kit, strategy, problem, g)
        left, done = problem.residual(u, g), report.status == int(Status.CONVERGED)
        allowed = 2 * default_rtol(kit.backend, kit.array(g)) + 1e4 * kit.eps
        assert (left[done] <= allowed).all(), f"CONVERGED, but ‖g + Jᵀu − u‖/‖g‖ = {left}"
        if option_values(strategy).get("max_steps") == "auto":
            assert done.all(), f"statuses {report.status} with residuals of {left} for 96 unknowns"

    def test_coupled_rows_are_not_a_solution(self, kit: Kit, strategy: Strategy) -> None:
        """Couple the products of samples: what is CONVERGED must still be a solution."""
        if not strategy.exact or not kit.eager:
            pytest.skip("the strategy approximates, or products are compiled")
        problem, g = hard_symmetric()
        matrix = kit.array(problem.a)
        alone = kit.vjp(matrix)

        def coupled(u: Array) -> Array:
            return alone(u) + 0.5 * kit.backend.xp.roll(u, 1, axis=0)

        u, report = strategy.solve_adjoint(kit.backend, coupled, kit.array(g), None)
        left = kit.numpy(kit.backend.norm(kit.array(g) + coupled(u) - u)) / np.linalg.norm(g, axis=1)
        done = kit.numpy(report.status) == int(Status.CONVERGED)
        assert (left[done] <= 1e-2).all(), f"CONVERGED, but ‖g + Jᵀu − u‖/‖g‖ = {left}"
