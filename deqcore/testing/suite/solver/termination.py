"""What a solver must keep where a solve must not end as CONVERGED, or must not end yet."""

from __future__ import annotations

import warnings
from typing import Any, Final

import numpy as np

from deqcore.abc.solver import Solver
from deqcore.errors import DerivativeWarning
from deqcore.options import option_values
from deqcore.testing.suite.base import Conformance, several
from deqcore.testing.suite.fixtures import Kit, affine, close
from deqcore.types import Map, Status

BUDGET: Final = 80
SHORT: Final = 6  # slots, so few that two steps, a refused one and four after a restart fill them


def rootless(xp: Any, name: str) -> Map:
    """Return a map without a fixed point, whose residual stays above 0.5 while the iterate grows."""
    maps: dict[str, Map] = {
        "step": lambda z: z + 1.0 + 0.5 * xp.tanh(z),
        "translation": lambda z: z + 1.0,
        "slope": lambda z: 1.01 * z + 0.01 * xp.abs(z) + 1.0,
    }
    return maps[name]


class EndTests(Conformance):
    """The ends of solves, and the new beginnings after refused steps."""

    @several("name", ["step", "translation", "slope"])
    @several("dtype", ["float32", "float64"])
    def test_growth_of_the_iterate_meets_no_tolerance(
        self, kit: Kit, solver_name: str, settings: Any, name: str, dtype: str
    ) -> None:
        """Grow z until rtol·‖f(z)‖ exceeds the residual; such a point must not be reported as a fixed point."""
        z0 = kit.array(np.array([[0.0] * 3, [0.5] * 3]), dtype)
        f = rootless(kit.backend.xp, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DerivativeWarning)  # `slope` has a kink at 0, where the solve starts
            sol = kit.solve(f, z0, solver=solver_name, rtol=1e-4, options=settings, max_steps=BUDGET)
        done = kit.numpy(sol.status) == int(Status.CONVERGED)
        size = np.linalg.norm(kit.numpy(sol.value).astype(float), axis=1)
        assert not done.any(), (
            f"CONVERGED by growth of the iterate: f has no fixed point, ‖f(z)‖ = {size}, residual {sol.residual}"
        )

    def test_an_equilibrium_at_zero_is_met(self, kit: Kit, solver_name: str, settings: Any) -> None:
        """Let ‖f(z)‖ fall with the residual, so that their ratio carries no information."""
        z0 = kit.array(np.ones((2, 3)))
        f = lambda z: 0.5 * kit.backend.xp.tanh(z)  # noqa: E731
        sol = kit.solve(f, z0, solver=solver_name, rtol=1e-6, options=settings, max_steps=300)
        result = [Status(int(code)).name for code in kit.numpy(sol.status)]
        assert result == ["CONVERGED"] * 2, f"an equilibrium at 0 ended as {result} with residuals {sol.residual}"
        assert np.abs(kit.numpy(sol.value)).max() < 1e-12, "CONVERGED, but not at 0"

    def test_a_restarted_sample_begins_where_it_is_put(self, kit: Kit, solver: Solver) -> None:
        """Restart two samples after a step to where f is not finite, at one point and with one f, but other iterates.

        The next step must evaluate f at that point, the three steps after it must be those of a new solve, and all
        steps those of the sample with another past. Samples share the slots of a history, and a sample loses pairs when
        they are full. A short history is therefore full when the restart comes, so that three steps lose none.
        """
        problem, backend, size = affine(norm=0.5), kit.backend, option_values(solver).get("history_size")
        before = size - 1 if isinstance(size, int) and size < SHORT else 2
        problem.a[1], problem.b[1] = problem.a[0], problem.b[0]
        f = kit.map(problem)
        rows, point = kit.array([True, True, False], "bool"), kit.array(np.full((3, 6), 0.25))
        with backend.errstate():
            z = kit.array(np.random.default_rng(18).standard_normal((3, 6)))
            fz = f(z)
            state = solver.init(backend, z, fz)
            for _ in range(before):
                z, fz, state = solver.step(backend, f, z, fz, state)
            bad = lambda z: backend.select(rows, backend.xp.full_like(z, float("nan")), f(z))  # noqa: E731
            z, fz, state = solver.step(backend, bad, z, fz, state)
            z, fz = backend.select(rows, point, z), backend.select(rows, point, fz)
            state = solver.restarted(backend, rows, z, state)
            fresh, value = point, f(point)
            anew = solver.init(backend, fresh, value)
            z, fz, state = solver.step(backend, f, z, fz, state)
            close(kit.numpy(z)[0], kit.numpy(point)[0], 100 * kit.eps, "restarted: the point where f is evaluated")
            tolerance = 1e-9 if kit.eps < 1e-10 else 1e-3
            for step in range(1, 6):
                z, fz, state = solver.step(backend, f, z, fz, state)
                close(kit.numpy(z)[0], kit.numpy(z)[1], tolerance, f"restarted: step {step} from there, by the past")
                if step < 4:
                    fresh, value, anew = solver.step(backend, f, fresh, value, anew)
                    close(kit.numpy(z)[0], kit.numpy(fresh)[0], tolerance, f"restarted: step {step} from there")
