"""What a single step of a solver must keep."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

import deqcore
from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.solver import Solver, map_state
from deqcore.options import option_values
from deqcore.solve.step import copy_state
from deqcore.testing.problems import golden
from deqcore.testing.suite.base import DTYPES, Conformance, needs, several
from deqcore.testing.suite.fixtures import Kit, affine, close
from deqcore.testing.suite.import_cost import check_light
from deqcore.types import Array, Map


def walk_steps(kit: Kit, solver: Solver, f: Map, z: Any, steps: int, *, jit: bool = True) -> list[tuple[Any, Any, Any]]:
    """`(z, f(z), state)` before the first step and after each, without the loop; compiled where the backend can."""
    compiled = kit.backend.harness.jit if jit else lambda step: step
    init = compiled(lambda z, fz: solver.init(kit.backend, z, fz))
    step = compiled(lambda z, fz, state: solver.step(kit.backend, f, z, fz, state))
    with kit.backend.errstate():  # as the loop is
        fz = f(z)
        result: list[tuple[Any, Any, Any]] = [(z, fz, init(z, fz))]
        for _ in range(steps):
            result.append(step(*result[-1]))
    return result


def overshooting(kit: Kit, rows: slice = slice(0, 3)) -> tuple[Map, Any]:
    """F and z0 of the golden problem `overshoot`, where a solver has to search, for some of its samples."""
    problem = golden("overshoot").problem
    w, x = kit.array(problem.params["W"]), kit.array(problem.inputs[rows])
    xp = kit.backend.xp
    return lambda z: z - xp.tanh(xp.sum(w[None] * z[:, None, :], axis=2) - x), kit.array(problem.z0[rows])


class _Counter:
    """Counts products J v of a backend, and calls of a function outside of them."""

    def __init__(self, backend: Backend) -> None:
        self._jvp = backend.autodiff.jvp
        self._inside = False
        self.calls = 0

    def counted(self, f: Map) -> Map:
        def run(z: Array) -> Array:
            self.calls += not self._inside
            return f(z)

        return run

    def jvp(self, f: Map, z: Array) -> Map | None:
        with self._within():
            jvp = self._jvp(f, z)
        if jvp is None:
            return None

        def product(v: Array) -> Array:
            self.calls += 1
            with self._within():
                return jvp(v)

        return product

    @contextlib.contextmanager
    def _within(self) -> Iterator[None]:
        self._inside = True
        yield
        self._inside = False


class StepTests(Conformance):
    """`init` and `step` themselves."""

    def test_is_a_frozen_dataclass_of_options(self, kit: Kit, solver: Solver, solver_name: str) -> None:
        assert isinstance(solver, Solver), "a solver must be a subclass of deqcore.Solver."
        assert dataclasses.is_dataclass(type(solver)), "options are fields of a dataclass"
        assert hash(solver) == hash(copy.copy(solver)), "compiled solves are cached by the solver"
        known = dataclasses.fields(solver)  # type: ignore[arg-type]
        name = known[0].name if known else "anything"
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
            setattr(solver, name, None)

    def test_it_imports_no_framework(self, kit: Kit, solver_name: str) -> None:
        check_light("solver", solver_name)

    @several("dtype", [*DTYPES, "bfloat16"])
    def test_steps_keep_structure_shapes_and_dtypes(self, kit: Kit, solver: Solver, dtype: str) -> None:
        problem = affine(norm=0.5)
        z0 = kit.backend.astype(kit.array(np.zeros((3, 6)), "float32"), dtype)
        f = lambda z: kit.backend.cast(kit.map(problem, "float32")(kit.backend.astype(z, "float32")), z)  # noqa: E731
        kinds = [self._kinds(kit, result) for result in walk_steps(kit, solver, f, z0, 3)]
        for step, kind in enumerate(kinds[1:], 1):
            assert kind == kinds[0], f"after step {step}"
        assert kinds[0][0] == kinds[0][1] == f"{dtype} (3, 6)", (
            "z and f(z) of a step must have the dtype and the shape of z. Use arrays made with `like=z`, and "
            "no constants of another dtype."
        )

    def _kinds(self, kit: Kit, step: Any) -> list[str]:
        kinds: list[str] = []

        def note(leaf: Any) -> Any:
            if isinstance(leaf, History):
                dot = leaf.dot(step[0]) if leaf.vectors().shape[-1] == 6 else leaf.count()
                kinds.append(f"history {leaf.history_size} {kit.backend.dtype_name(dot)}")
            else:
                kinds.append(f"{kit.backend.dtype_name(leaf)} {tuple(leaf.shape)}")
            return leaf

        map_state(step, note)
        return kinds

    def test_a_step_returns_f_of_z(self, kit: Kit, solver: Solver) -> None:
        problem = affine()
        f = kit.map(problem)
        for z, fz, _ in walk_steps(kit, solver, f, kit.array(np.zeros((3, 6))), 4):
            close(kit.numpy(fz), kit.numpy(f(z)), 100 * kit.eps, "the f(z) that a step returns")

    def test_the_residual_norm_is_that_of_the_iterate(self, kit: Kit, solver: Solver) -> None:
        for z, fz, state in walk_steps(kit, solver, kit.map(affine()), kit.array(np.ones((3, 6))), 4):
            known = solver.residual_norm(kit.backend, state)
            if known is not None:
                true = np.linalg.norm(kit.numpy(fz) - kit.numpy(z), axis=1)
                close(kit.numpy(known), true, 100 * kit.eps, "residual_norm")

    def test_a_step_is_a_pure_function(self, kit: Kit, solver: Solver) -> None:
        f, z0 = kit.map(affine()), kit.array(np.zeros((3, 6)))
        z, fz, state = walk_steps(kit, solver, f, z0, 2)[-1]
        before = np.array(kit.numpy(z)), np.array(kit.numpy(fz))
        # Of copies: a history whose ring is full may overwrite its oldest vector in place.
        first, again = (solver.step(kit.backend, f, z, fz, copy_state(state)) for _ in range(2))
        assert np.array_equal(kit.numpy(first[0]), kit.numpy(again[0])), "two steps from one state differ"
        assert np.array_equal(kit.numpy(z), before[0]), "a step wrote into z"
        assert np.array_equal(kit.numpy(fz), before[1]), "a step wrote into f(z)"

    def test_steps_do_not_depend_on_scale(self, kit: Kit, solver: Solver) -> None:
        """z ← 4 z and f ← 4 f(z/4) is the same problem in other units, so the iterates are the same."""
        f = kit.map(affine())
        plain = walk_steps(kit, solver, f, kit.array(np.ones((3, 6))), 4)[-1][0]
        scaled = walk_steps(kit, solver, lambda z: 4.0 * f(0.25 * z), kit.array(np.full((3, 6), 4.0)), 4)[-1][0]
        close(0.25 * kit.numpy(scaled), kit.numpy(plain), 1e-6 if kit.eps < 1e-10 else 1e-3, "iterates in other units")

    def test_an_opening_takes_the_steps_of_the_solver(self, kit: Kit, solver: Solver) -> None:
        """Step samples of all speeds, by the opening and by the solver: those served must take the same steps.

        After each of them the solver continues from both.
        """
        opening = solver.opening()
        if opening is None:
            pytest.skip("the solver has no opening")
        rates = kit.array(np.asarray([0.1, 0.4, 0.97, -20.0])[:, None])
        f = lambda z: rates * z + 1.0  # noqa: E731
        compiled = kit.backend.harness.jit
        first, step = (
            compiled(lambda z, fz, state, s=s: s.step(kit.backend, f, z, fz, state)) for s in (opening, solver)
        )
        continued = compiled(lambda z, fz, state: (z, fz, opening.continued(kit.backend, z, fz, state)))
        ahead = walk_steps(kit, opening, f, kit.array(np.ones((4, 3))), 0)[0]
        at = walk_steps(kit, solver, f, kit.array(np.ones((4, 3))), 0)[0]
        rows = np.ones(4, bool)
        for place in range(6):
            rows &= np.asarray(kit.numpy(opening.serves(kit.backend, ahead[2])))
            assert place or rows.any(), "an opening must serve some sample at the start, or it is of no use"
            at, ahead = step(*at), first(*ahead)
            own = at, step(*at[:2], copy_state(at[2]))
            other = ahead, step(*continued(*ahead))
            for name, ours, theirs in zip(("a step", "the step after it"), own, other, strict=True):
                for part in (0, 1):
                    exact, result = kit.numpy(ours[part])[rows], kit.numpy(theirs[part])[rows]
                    close(result, exact, 4 * kit.eps, f"{('z', 'f(z)')[part]} after {name} of an opening")

    def test_f_is_evaluated_as_often_as_declared(self, kit: Kit, solver: Solver) -> None:
        calls = []
        f = kit.map(affine())

        def counted(z: Any) -> Any:
            calls.append(z)
            return f(z)

        z = kit.array(np.zeros((3, 6)))
        fz = f(z)
        state = solver.init(kit.backend, z, fz)
        assert not calls, "init must not evaluate f: it was given f(z)"
        if type(solver).evaluations is not Solver.evaluations:
            pytest.skip("the solver counts its evaluations itself")
        solver.step(kit.backend, counted, z, fz, state)
        assert len(calls) == solver.evaluations_per_step, (
            f"one step must evaluate f `evaluations_per_step` times ({len(calls)} calls, "
            f"{solver.evaluations_per_step} declared). Set evaluations_per_step to the number of calls of f in "
            "`step`, or call f as often as declared."
        )

    def test_evaluations_and_products_are_counted(self, kit: Kit, solver: Solver) -> None:
        """Count the calls of f and the products J v of a solver with its own counts, on a problem with a search."""
        if type(solver).evaluations is Solver.evaluations or not kit.eager:
            pytest.skip("the solver's steps all cost the same, or a traced loop calls f once, whatever it runs")
        f, z0 = overshooting(kit, slice(0, 1))
        counter = _Counter(kit.backend)
        with mock.patch.object(kit.backend.autodiff, "jvp", counter.jvp):
            result = walk_steps(kit, solver, counter.counted(f), z0, 4, jit=False)
        steps = kit.backend.xp.zeros_like(kit.array(np.zeros(1)), dtype=kit.backend.xp.int32) + 4
        reported = int(kit.numpy(solver.evaluations(kit.backend, steps, result[-1][2]))[0])
        assert reported == counter.calls, f"evaluations: reported {reported}, counted {counter.calls}"

    def test_every_number_among_its_options_matters(self, kit: Kit, solver: Solver) -> None:
        """Change each numeric option: one that changes no iterate is not read."""
        if not kit.eager:
            pytest.skip("options are read in Python, and compiling for each value takes long")
        problems = (overshooting(kit), (kit.map(affine(norm=3.0)), kit.array(np.zeros((3, 6)))))
        plain = self._iterates(kit, solver, problems)
        for name, value in option_values(solver).items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            others = self._others(solver, name, value)
            changed = (not np.array_equal(plain, self._iterates(kit, other, problems)) for other in others)
            assert any(changed), f"{name} = {value} or any other value gives the same iterates"

    def _iterates(self, kit: Kit, solver: Solver, problems: Any) -> Any:
        return np.stack([kit.numpy(z) for f, z0 in problems for z, *_ in walk_steps(kit, solver, f, z0, 9)])

    def _others(self, solver: Solver, name: str, value: float) -> list[Solver]:
        """Return the solver with other accepted values of one option."""
        whole = isinstance(value, int)
        others: list[Solver] = []
        for other in (1, 3, value - 1, value + 1) if whole else (1.01, 0.5 * value, 2.0 * value, 0.1, 0.01):
            with contextlib.suppress(ValueError):
                others.append(dataclasses.replace(solver, **{name: other}))  # type: ignore[type-var]
        return [other for other in others if other != solver]

    @needs("autodiff")
    def test_steps_can_be_differentiated_through(self, kit: Kit, solver_name: str, settings: Any) -> None:
        """Compare the gradient of `unrolled` with central differences of its value."""
        if not kit.backend.capabilities.float64:
            pytest.skip("central differences need double precision")
        problem, h = affine(batch=1, n=3), 1e-6
        g = np.random.default_rng(5).standard_normal((1, 3))
        config = kit.config(solver=solver_name, options=settings, strategy="unrolled", strategy_options={"steps": 2})
        a = kit.array(problem.a)

        def unrolled(b: Any) -> tuple[Any, Any]:
            f = lambda z, b: kit.backend.xp.tanh(kit.backend.xp.sum(a * z[:, None, :], axis=2) + b)  # noqa: E731
            z0, x = kit.array(np.zeros((1, 3))), kit.array(b)
            z, (db,) = deqcore.vjp(f, z0, x, cotangent=kit.array(g), config=config)
            return kit.numpy(z), kit.numpy(db)

        expected = np.zeros((1, 3))
        for i in range(3):
            shift = np.zeros((1, 3))
            shift[0, i] = h
            expected[0, i] = np.sum(g * (unrolled(problem.b + shift)[0] - unrolled(problem.b - shift)[0])) / (2 * h)
        close(unrolled(problem.b)[1], expected, 1e-6, "gradient through two steps")
