"""What the inverse-Jacobian estimate that a solver leaves behind must keep."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import deqcore
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.solver import Solver
from deqcore.options import option_values
from deqcore.testing.suite.base import Conformance
from deqcore.testing.suite.fixtures import Affine, Kit, affine, close
from deqcore.testing.suite.solver.steps import walk_steps


class EstimateTests(Conformance):
    """Only for a solver with `has_estimate`."""

    def test_without_an_estimate_there_is_none(self, kit: Kit, solver: Solver) -> None:
        if solver.has_estimate:
            pytest.skip("the solver keeps an estimate")
        *_, state = walk_steps(kit, solver, kit.map(affine()), kit.array(np.zeros((3, 6))), 1)[-1]
        assert solver.inverse_jacobian(kit.backend, state) is None, (
            "inverse_jacobian must return None where has_estimate is false. Leave it undefined, or set "
            "has_estimate = True."
        )

    def test_the_transpose_is_the_transpose(self, kit: Kit, solver: Solver) -> None:
        a, b = np.random.default_rng(7).standard_normal((2, 3, 6))
        for h, *_ in self._estimates(kit, solver, affine()):
            left = np.sum(a * self._apply(kit, h, b), axis=1)
            right = np.sum(self._apply(kit, h, a, transpose=True) * b, axis=1)
            close(left, right, 1e-7 if kit.eps < 1e-10 else 1e-3, "aᵀ(H b) and (Hᵀa)ᵀb")

    def test_the_latest_secant_equation_holds(self, kit: Kit, solver: Solver) -> None:
        """Check `inverse_jacobian`. A `secant_estimate` may be regularised, and must be nearer than H = −I."""
        for number, (h, s, y) in enumerate(self._estimates(kit, solver, affine())):
            allowed = 0.5 * np.linalg.norm(s + y) / np.linalg.norm(s) if number else 1e-5 if kit.eps < 1e-10 else 1e-2
            error = self._distance(kit, h, self._apply(kit, h, y), s)
            assert error <= allowed, f"H y = s for the latest pair is off by {error:.1e}, allowed {allowed:.1e}"

    def test_the_sharp_estimate_keeps_the_latest_pair(self, kit: Kit, solver: Solver) -> None:
        """`apply_transpose_unregularised` has only the regularisation that rounding needs: H y = s within a percent."""
        for h, s, y in self._estimates(kit, solver, affine()):
            result = np.sum(self._sharp(kit, h) * y[:, None, :], axis=2)
            error = self._distance(kit, h, result, s)
            assert error <= 1e-2, f"H y = s for the latest pair is off by {error:.1e}, judged sharply"

    def test_a_sample_without_pairs_says_so(self, kit: Kit, solver: Solver) -> None:
        """H is −I for a sample that `known` leaves out; before the first step that is every sample, or None."""
        v = np.random.default_rng(8).standard_normal((3, 6))
        for h, *_ in self._estimates(kit, solver, affine(norm=0.3)):
            without = ~self._known(kit, h)
            close(self._apply(kit, h, v)[without], -v[without], 0.0, "H v for samples without pairs")

    def test_a_bad_vector_changes_no_bit_of_other_samples(self, kit: Kit, solver: Solver) -> None:
        """Apply H and Hᵀ to vectors of which one is NaN, as a cotangent may be."""
        v = np.random.default_rng(8).standard_normal((3, 6))
        bad = v.copy()
        bad[1] = np.nan
        for h, *_ in self._estimates(kit, solver, affine(norm=0.9)):
            for name in ("apply", "apply_transpose", "apply_transpose_unregularised", "solve_transpose"):
                for operator in (h, h.prepared()):
                    good, beside = (kit.numpy(getattr(operator, name)(kit.array(each)))[[0, 2]] for each in (v, bad))
                    assert np.array_equal(good, beside), f"{name}: a sample of H depends on a bad vector of another"

    def test_the_solution_is_minus_the_transpose(self, kit: Kit, solver: Solver) -> None:
        """`solve_transpose` gives −Hᵀg, which reuse takes for the solution of the adjoint equation."""
        g = kit.array(np.random.default_rng(9).standard_normal((3, 6)))
        for h, *_ in self._estimates(kit, solver, affine(norm=0.9)):
            found, expected = kit.numpy(h.solve_transpose(g)), -kit.numpy(h.apply_transpose(g))
            close(found, expected, 1e-12 if kit.eps < 1e-10 else 1e-5, "solve_transpose, minus Hᵀg")

    def test_a_prepared_estimate_is_the_estimate(self, kit: Kit, solver: Solver) -> None:
        """Compare H and Hᵀ after `prepared`, which may form a matrix for many products, with those before."""
        v = kit.array(np.random.default_rng(9).standard_normal((3, 6)))
        for h, *_ in self._estimates(kit, solver, affine(norm=0.9)):
            ready = h.prepared()
            for name in ("apply", "apply_transpose"):
                result, expected = (kit.numpy(getattr(each, name)(v)) for each in (ready, h))
                close(result, expected, 1e-6 if kit.eps < 1e-10 else 1e-2, f"{name} of the prepared estimate")

    def test_the_secant_estimate_keeps_both_pairs(self, kit: Kit, solver: Solver) -> None:
        """Require all secant equations at once up to 1 %, which a recursive update does not satisfy."""
        if type(solver).secant_estimate is Solver.secant_estimate or option_values(solver).get("history_size") == 1:
            pytest.skip("the solver has one estimate only, or keeps one pair")
        *_, (h, *_) = self._estimates(kit, solver, affine(norm=0.95), steps=2)
        walked = walk_steps(kit, solver, kit.map(affine(norm=0.95)), kit.array(np.zeros((3, 6))), 2)
        at = [(kit.numpy(z), kit.numpy(fz)) for z, fz, _ in walked]
        columns = self._sharp(kit, h)
        for number, ((z0, f0), (z1, f1)) in enumerate(pairwise(at), 1):
            s, y = z1 - z0, (f1 - z1) - (f0 - z0)
            error = np.linalg.norm(np.sum(columns * y[:, None, :], axis=2) - s) / np.linalg.norm(s)
            assert error <= 1e-2, f"H y = s for pair {number} of 2 is off by {error:.1e}, judged sharply"

    def test_where_f_is_flat_it_is_minus_the_identity(self, kit: Kit, solver: Solver) -> None:
        flat = Affine(np.zeros((3, 6, 6)), affine().b)
        v = np.random.default_rng(8).standard_normal((3, 6))
        for h, *_ in self._estimates(kit, solver, flat, steps=1):
            close(self._apply(kit, h, v), -v, 1e-5, "H v for f without slope")

    def test_a_frozen_sample_keeps_its_estimate(
        self, kit: Kit, solver: Solver, solver_name: str, settings: Any
    ) -> None:
        """Compare the estimate of a sample that ended early with the one that it gets alone."""
        if not solver.has_estimate:
            pytest.skip("the solver keeps no estimate")
        problem = affine(norm=0.9)
        problem.a[0] *= 0.3
        v = np.random.default_rng(9).standard_normal((3, 6))
        result = []
        for rows in (slice(0, 3), slice(0, 1)):
            part = Affine(problem.a[rows], problem.b[rows])
            z0 = kit.array(np.zeros(part.b.shape))
            sol = kit.solve(kit.map(part), z0, solver=solver_name, rtol=1e-4, options=settings)
            h = self._estimate(kit, solver, self._state(sol))
            result.append(self._apply(kit, h, v[rows], transpose=True)[0])
        close(result[0], result[1], 1e-5 if kit.eps < 1e-10 else 5e-2, "Hᵀv in a batch and alone")

    def test_continuing_leaves_the_first_estimate_alone(
        self, kit: Kit, solver: Solver, solver_name: str, settings: Any
    ) -> None:
        if not solver.has_estimate:
            pytest.skip("the solver keeps no estimate")
        f, z0 = kit.map(affine(norm=0.9)), kit.array(np.zeros((3, 6)))
        v = np.random.default_rng(10).standard_normal((3, 6))
        config = kit.config(solver=solver_name, rtol=1e-12, max_steps=3, options=settings)
        first = deqcore.fixed_point(f, z0, config=config)
        before = self._apply(kit, self._estimate(kit, solver, self._state(first)), v)
        second = deqcore.fixed_point(f, z0, state=first.state, config=config)
        after = self._apply(kit, self._estimate(kit, solver, self._state(first)), v)
        assert np.array_equal(before, after), "continuing a solve destroyed an estimate that a backward may still need"
        before = self._apply(kit, self._estimate(kit, solver, self._state(second)), v)
        other = kit.map(affine(norm=0.9, seed=1))
        deqcore.fixed_point(other, z0, state=first.state, config=config)
        after = self._apply(kit, self._estimate(kit, solver, self._state(second)), v)
        assert np.array_equal(before, after), (
            "continuing a solve twice destroyed the estimate of the first continuation"
        )

    def _estimates(self, kit: Kit, solver: Solver, problem: Affine, steps: int = 4) -> Iterator[tuple[Any, Any, Any]]:
        """Yield both estimates after some steps, with the latest pair s = Δz, y = Δ(f(z) − z)."""
        if not solver.has_estimate:
            pytest.skip("the solver keeps no estimate")
        walked = walk_steps(kit, solver, kit.map(problem), kit.array(np.zeros((3, 6))), steps)
        (z0, f0), (z1, f1) = ([kit.numpy(a) for a in result[:2]] for result in walked[-2:])
        s, y = z1 - z0, (f1 - z1) - (f0 - z0)
        for make in (solver.inverse_jacobian, solver.secant_estimate):
            h = make(kit.backend, walked[-1][2])
            assert h is not None, "has_estimate is True, but there is none"
            yield h, s, y

    def _known(self, kit: Kit, h: InverseJacobian) -> Any:
        """Return the samples that have pairs `(3,)`."""
        known = h.known()
        return np.ones(3, bool) if known is None else kit.numpy(known)

    def _distance(self, kit: Kit, h: InverseJacobian, result: Any, s: Any) -> float:
        """Return the relative distance from `s` over the samples that have pairs, 0 if none has."""
        known = self._known(kit, h)
        return float(np.linalg.norm((result - s)[known])) / max(float(np.linalg.norm(s[known])), 1e-300)

    def _sharp(self, kit: Kit, h: InverseJacobian) -> Any:
        """H as a matrix `(3, 6, 6)`, judged sharply."""
        rows = [kit.numpy(h.apply_transpose_unregularised(kit.array(np.tile(unit, (3, 1))))) for unit in np.eye(6)]
        return np.stack(rows, axis=1)

    def _state(self, sol: deqcore.Solution) -> Any:
        assert sol.state is not None, (
            "a solve by a solver with an estimate must return sol.state, which holds the estimate."
        )
        return sol.state.carry.state

    def _estimate(self, kit: Kit, solver: Solver, state: Any) -> InverseJacobian:
        h = solver.inverse_jacobian(kit.backend, state)
        assert h is not None, (
            "inverse_jacobian must return an InverseJacobian where has_estimate is true. Return one, or set "
            "has_estimate = False."
        )
        return h

    def _apply(self, kit: Kit, h: InverseJacobian, v: Any, transpose: bool = False) -> Any:
        product = h.apply_transpose if transpose else h.apply
        return kit.numpy(product(kit.array(v)))
