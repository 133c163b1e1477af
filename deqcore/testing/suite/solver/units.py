"""Units of a sample that f couples: each has its own solve, and a causal method tells no unit of a later one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from deqcore.abc.solver import Solver
from deqcore.errors import ConfigError
from deqcore.testing.suite.base import several
from deqcore.testing.suite.fixtures import Kit, Tokens, close, tokens
from deqcore.types import Status


class UnitTests:
    """Tests with `forward.batch = 2`. A solver that refuses coupled units is skipped."""

    def test_units_converge_together(self, kit: Kit, solver: Solver, solver_name: str, settings: Any) -> None:
        """Compare with the dense solution, and measure every residual at the one point that is returned."""
        problem, rtol = tokens(), 1e-8
        result, at = self._solved(kit, solver, solver_name, settings, problem, rtol=rtol)
        status, residual = kit.numpy(result.status), kit.numpy(result.residual)
        assert status.shape == problem.b.shape[:2], f"the status must be one per unit (got the shape {status.shape})"
        assert (status == int(Status.CONVERGED)).all(), f"units of a contraction ended as {status}"
        close(kit.numpy(result.value), problem.root, 50 * max(rtol, kit.eps**0.5), "z*")
        true, size = np.linalg.norm(at - kit.numpy(result.value), axis=2), np.linalg.norm(at, axis=2)
        assert (true <= 1.01 * max(rtol, kit.eps**0.5) * size).all(), (
            f"units that converged have residuals of up to {(true / size).max():.2g} at the returned point"
        )
        close(residual, true, 1e-6, "the reported residuals")

    @several(("rtol", "max_steps"), [(0.05, 100), (1e-4, 100), (1e-12, 3)])
    def test_a_later_unit_changes_no_earlier_one(
        self, kit: Kit, solver: Solver, solver_name: str, settings: Any, rtol: float, max_steps: int
    ) -> None:
        """Change the last unit: earlier values, residuals, statuses and steps keep every bit, early ends included."""
        if not solver.causal:
            pytest.skip("the solver does not declare that it is causal")
        sides = [
            self._solved(kit, solver, solver_name, settings, problem, rtol=rtol, max_steps=max_steps)[0]
            for problem in (tokens(), tokens().later())
        ]
        for name in ("value", "residual", "status", "steps"):
            before, after = (kit.numpy(getattr(side, name))[:, :-1] for side in sides)
            change = np.abs(before - after).max()
            assert change == 0, f"the last unit changed the {name} of earlier ones by up to {change:.2g}"

    def _solved(
        self, kit: Kit, solver: Solver, name: str, settings: Mapping[str, object], problem: Tokens, **more: Any
    ) -> tuple[Any, Any]:
        """Return the solution, and f at its value in NumPy."""
        try:
            solver.for_coupled_units()
        except ConfigError as error:
            pytest.skip(f"the solver refuses coupled units: {error}")
        b = kit.array(problem.b)
        result = kit.solve(kit.token_map(problem), 0 * b, b, solver=name, options=settings, batch=2, **more)
        return result, problem.m @ kit.numpy(result.value) @ problem.w + problem.b
