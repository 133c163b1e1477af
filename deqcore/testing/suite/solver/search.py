"""What a solver must keep where it has to search: where residuals grow, steps are refused or shortened."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from deqcore.abc.solver import Solver
from deqcore.testing.problems import golden
from deqcore.testing.suite.base import Conformance
from deqcore.testing.suite.fixtures import Affine, Kit, affine, close
from deqcore.testing.suite.scales import scaled, scales
from deqcore.testing.suite.solver.steps import overshooting, walk_steps
from deqcore.types import Map


class SearchTests(Conformance):
    """Problems on which plain iteration diverges or overshoots."""

    def test_steps_in_a_batch_are_those_taken_alone(self, kit: Kit, solver: Solver) -> None:
        """Compare with solves of one sample: a search, refused step or restart must not affect other samples."""
        if not kit.eager:
            pytest.skip("compiling for each sample takes long")
        f, z0 = overshooting(kit)
        self._alone(kit, solver, f, z0, [overshooting(kit, slice(i, i + 1)) for i in range(3)])
        problem = affine(norm=2.0)
        problem.a[0] *= 0.2
        parts = [Affine(problem.a[i : i + 1], problem.b[i : i + 1]) for i in range(3)]
        starts = [kit.array(np.zeros((1, 6)))] * 3
        z0 = kit.array(np.zeros((3, 6)))
        self._alone(kit, solver, kit.map(problem), z0, list(zip(map(kit.map, parts), starts, strict=True)))

    def test_a_residual_that_grows_is_judged_as_alone(self, kit: Kit, solver_name: str, settings: Any) -> None:
        """Take three steps of a sample whose residual grows by 1.9 and 6, alone and beside one that grows at once."""
        if not kit.eager:
            pytest.skip("compiling for each sample takes long")

        def solved(f: Map, start: list[list[float]]) -> Any:
            more = {"solver": solver_name, "rtol": 1e-9, "max_steps": 3, "options": settings}
            return kit.solve(f, kit.array(np.asarray(start)), **more)

        xp = kit.backend.xp

        def stairs(z: Any) -> Any:
            slopes = ((0.9, 0.0, 1.0), (5.0, 1.0, 2.9), (-1.0, 2.9, 14.3))
            return z + 1.0 + sum(slope * _within(xp, z, low, high) for slope, low, high in slopes)

        mate = kit.array(np.asarray([[0.0], [1.0]]))
        alone = solved(stairs, [[0.0]])
        beside = solved(lambda z: (1.0 - mate) * stairs(z) + mate * (1.0 - 3.0 * z), [[0.0], [5.0]])
        for quantity in ("value", "residual", "steps"):
            result, expected = (kit.numpy(getattr(each, quantity))[0] for each in (beside, alone))
            close(result, expected, 1e-6 if kit.eps < 1e-10 else 1e-2, f"{quantity} beside another sample")

    def test_a_search_takes_the_same_steps_in_other_units(self, kit: Kit, solver: Solver) -> None:
        """Step s f(z/s), s at both ends of the range, where extrapolation leads to far larger residuals.

        Beyond a kink near the root the slope of the residual is 1e2 or 1e9 times as large as before it, so that an
        extrapolated step may be refused, with a residual that shows the slope or one that is too large for it.
        """
        if not kit.eager:
            pytest.skip("compiling for each scale takes long")
        dtype, xp = "float64" if kit.eps < 1e-10 else "float32", kit.backend.xp
        steep = kit.array(np.asarray([1e2, 1e9, 1e2, 1e9])[:, None], dtype)

        def f(z: Any) -> Any:
            beyond = xp.where(z > 18.0, z - 18.0, xp.zeros_like(z))
            return z + 0.03 * (20.0 - z) - steep * beyond

        def iterates(s: Any) -> Any:
            z0 = kit.array(np.linspace(0.0, 1.0, 4)[:, None] * s[:, None], dtype)
            walked = walk_steps(kit, solver, scaled(kit, f, s, dtype), z0, 12, jit=False)
            return np.stack([kit.numpy(z) / s[:, None] for z, *_ in walked])

        tiny, huge = np.sort(scales(2, dtype))
        expected = iterates(np.ones(4))
        for s in (np.array([tiny, tiny, huge, huge]), np.array([huge, huge, tiny, tiny])):
            close(iterates(s), expected, 1e-6 if kit.eps < 1e-10 else 1e-3, "iterates in other units")

    def _alone(self, kit: Kit, solver: Solver, f: Map, z0: Any, parts: list[tuple[Map, Any]]) -> None:
        together = [kit.numpy(z) for z, *_ in walk_steps(kit, solver, f, z0, 8)]
        for row, (part, start) in enumerate(parts):
            for step, (z, *_) in enumerate(walk_steps(kit, solver, part, start, 8)):
                result, expected = together[step][row], kit.numpy(z)[0]
                close(result, expected, 1e-6 if kit.eps < 1e-10 else 1e-2, f"sample {row} after step {step}")

    def test_an_estimate_learns_every_pair(self, kit: Kit, solver: Solver) -> None:
        """Check that H y = s holds after each step for the latest pair.

        Exceptions: a refused step leaves the old estimate, and a restart gives −I.
        """
        if not solver.has_estimate or not kit.eager or type(solver).evaluations is not Solver.evaluations:
            pytest.skip("the solver keeps no estimate, or evaluates f in loops or compiled code")
        if solver.evaluations_per_step != 1:
            pytest.skip("a step shows several pairs")
        problem = affine(norm=2.0)
        f, seen = kit.map(problem), []

        def watched(z: Any) -> Any:
            seen.append(z)
            return f(z)

        z = kit.array(np.zeros((3, 6)))
        fz = f(z)
        state, probe = solver.init(kit.backend, z, fz), np.random.default_rng(16).standard_normal((3, 6))
        with kit.backend.errstate():
            for step in range(1, 5):
                before, at, value = self._product(kit, solver, state, probe), kit.numpy(z), kit.numpy(fz)
                z, fz, state = solver.step(kit.backend, watched, z, fz, state)
                tried = kit.numpy(seen[-1])
                s, y = tried - at, kit.numpy(f(seen[-1])) - tried - value + at
                missed = np.linalg.norm(self._product(kit, solver, state, y) - s, axis=1) / np.linalg.norm(s, axis=1)
                stayed = (kit.numpy(z) == at).all(axis=1)
                after = self._product(kit, solver, state, probe)
                same, anew = (np.abs(after - other).max(axis=1) < 1e-9 for other in (before, -probe))
                learned = missed <= (1e-5 if kit.eps < 1e-10 else 1e-2)
                assert (learned | (stayed & same) | anew).all(), f"H y = s is off by {missed} after step {step}"

    def test_a_refused_step_is_tried_shorter(self, kit: Kit, solver: Solver) -> None:
        """Beyond a wall f gives NaN, which shows nothing of J: a solver that stays must come nearer each time."""
        if not kit.eager or type(solver).evaluations is not Solver.evaluations or solver.evaluations_per_step != 1:
            pytest.skip("f is evaluated in loops or compiled code, or several times a step")
        f, z0, args = kit.data(golden("walled"), "float64")
        seen = []

        def watched(z: Any) -> Any:
            seen.append(z)
            return f(z, *args)

        walked = walk_steps(kit, solver, watched, z0, 6, jit=False)
        at = [kit.numpy(z) for z, *_ in walked]
        lengths = [np.linalg.norm(kit.numpy(tried) - z, axis=1) for z, tried in zip(at, seen[1:], strict=False)]
        refused = [(new == old).all(axis=1) for old, new in pairwise(at)]
        if not any(each.any() for each in refused):
            pytest.skip("the solver refuses no step")
        for step, stayed in enumerate(refused[:-1]):
            shorter = lengths[step + 1] <= 0.75 * lengths[step]
            assert (shorter | ~stayed).all(), f"refused at {lengths[step]}, and then tried at {lengths[step + 1]}"
        assert not refused[-1].any(), "six steps, and no point with numbers was found"

    def _product(self, kit: Kit, solver: Solver, state: Any, v: Any) -> Any:
        h = solver.inverse_jacobian(kit.backend, state)
        assert h is not None, "has_estimate is True, but there is none"
        return kit.numpy(h.apply(kit.array(v)))


def _within(xp: Any, z: Any, low: float, high: float) -> Any:
    """Return how far z is inside of an interval, from 0 to its length."""
    inside = xp.where(z > low, z - low, xp.zeros_like(z))
    return xp.where(inside < high - low, inside, xp.full_like(z, high - low))
