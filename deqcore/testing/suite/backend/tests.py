"""`BackendTests`: everything that a backend must keep."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from deqcore.backward.exact_ift import ExactIFT
from deqcore.linear.plain_steps import MANY
from deqcore.testing.suite.backend.arrays import ArrayTests
from deqcore.testing.suite.backend.derivatives import DerivativeTests
from deqcore.testing.suite.backend.history import HistoryTests
from deqcore.testing.suite.base import several
from deqcore.testing.suite.complex_states import ComplexBackendTests
from deqcore.testing.suite.fixtures import Affine, Kit, affine, close
from deqcore.testing.suite.import_cost import check_light
from deqcore.types import Status


class BackendTests(ArrayTests, HistoryTests, DerivativeTests, ComplexBackendTests):
    """Subclass it, name your backend, and run pytest.

    Example:
        ::

            class TestMine(BackendTests):
                backends = ("mine",)
    """

    def test_its_plugin_is_light(self, kit: Kit) -> None:
        check_light("backend", kit.backend.name)

    @several("harm", [math.nan, math.inf])
    @several("solver", ["anderson", "broyden"])
    def test_a_bad_sample_changes_no_bit_of_its_neighbours(self, kit: Kit, solver: str, harm: float) -> None:
        problem = affine()
        b = problem.b.copy()
        b[1] = harm
        good, bad = (
            kit.solve(kit.map(Affine(problem.a, each)), kit.array(np.zeros((3, 6))), solver=solver, rtol=1e-9)
            for each in (problem.b, b)
        )
        for quantity in ("value", "residual", "steps"):
            one, two = (kit.numpy(getattr(sol, quantity))[[0, 2]] for sol in (good, bad))
            assert np.array_equal(one, two), f"{quantity} of a healthy sample depends on its neighbour"
        assert Status(int(kit.numpy(bad.status)[1])) is Status.NONFINITE, (
            "a sample whose f is NaN at the start must end as NONFINITE."
        )

    def test_the_residual_of_a_linear_solve_of_many_unknowns_is_the_true_one(self, kit: Kit) -> None:
        """Solve for samples that take plain steps, those of GMRES, and one without a finite cotangent."""
        if kit.backend.capabilities.nested_loops:
            pytest.skip("such a backend takes other steps, and compiles them")
        xp, (right, left) = kit.backend.xp, np.array([[0.5, 0.3, 0.9, 0.2, 0.5], [0.0, 0.3, 0.0, 0.1, 0.0]])[:, :, None]
        g = np.random.default_rng(0).standard_normal((len(right), MANY))
        g[4, 7] = math.nan
        a, c = kit.array(right), kit.array(left)
        u, report = ExactIFT(rtol=1e-4).solve_adjoint(
            kit.backend, lambda v: a * xp.roll(v, 1, axis=1) + c * xp.roll(v, -1, axis=1), kit.array(g), None
        )
        u, found = kit.numpy(u), kit.numpy(report.residual)
        lost = g - u + right * np.roll(u, 1, axis=1) + left * np.roll(u, -1, axis=1)
        true = np.linalg.norm(lost, axis=1) / np.linalg.norm(g, axis=1)
        assert (true[:4] <= 1.01e-4).all(), f"relative residuals of the adjoint equation {true[:4]}, tolerance 1e-4"
        close(found[:4], true[:4], 1e-2 * 1e-4, "reported residual of the adjoint equation")
        assert kit.numpy(report.status).tolist() == [int(Status.CONVERGED)] * 4 + [int(Status.NONFINITE)], (
            "a cotangent that is not finite must change the status of its own sample alone."
        )

    def test_integers_and_flags_in_the_state_are_carried_along(self, kit: Kit) -> None:
        """Solve for the numbers of a state that also has a mask and a count, which f gets as they are in z0."""
        mask = kit.array([[True, False], [True, True]], "bool")

        def f(state: Any) -> Any:
            moved = kit.backend.xp.where(state["mask"], 0.5 * state["z"] + 1.0, 0.0 * state["z"])
            return {"z": moved, "mask": state["mask"], "count": state["count"] + 1}

        z0 = {"z": kit.array(np.zeros((2, 2))), "mask": mask, "count": 3}
        sol = kit.solve(f, z0, solver="broyden", rtol=1e-9)
        close(kit.numpy(sol.value["z"]), np.array([[2.0, 0.0], [2.0, 2.0]]), 1e-5, "value beside a mask")
        assert sol.value["count"] == 3, (
            "an integer in the state must keep its value of z0. Let flatten return it as a leaf."
        )
        assert np.array_equal(kit.numpy(sol.value["mask"]), kit.numpy(mask)), (
            "a mask in the state must keep its values."
        )
