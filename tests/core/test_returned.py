"""A solver or strategy that returns something else than its contract says is named, with what it returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

import deqcore
from deqcore import Solver, StepStrategy, Strategy, plugins
from deqcore.abc.backward import report
from deqcore.errors import PluginError

WRONG: dict[str, Any] = {}


@dataclass(frozen=True)
class Stepping(Solver):
    case: str = ""

    def init(self, backend, z, fz):
        return ()

    def step(self, backend, f, z, fz, state):
        return WRONG[self.case](f, z, state)


@dataclass(frozen=True)
class AdjointSolving(Strategy):
    case: str = ""
    needs: ClassVar = "nothing"

    def solve_adjoint(self, backend, vjp, g, estimate):
        return WRONG[self.case](g, report(backend, g))


@dataclass(frozen=True)
class Valuing(StepStrategy):
    case: str = ""

    def value(self, backend, f, z0, forward, solver):
        return WRONG[self.case](f(forward.z))


@pytest.fixture(autouse=True)
def registered():
    for spec, cls in ((plugins.SolverSpec, "Stepping"), (plugins.StrategySpec, "AdjointSolving")):
        plugins.register(spec(cls.lower(), f"{__name__}:{cls}"))
    plugins.register(plugins.StrategySpec("valuing", f"{__name__}:Valuing"))
    yield
    plugins.reset()
    WRONG.clear()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            lambda f, z, state: (z, f(z)),
            r"Stepping.step must return \(z, f.*\(got a tuple of 2 \(a ndarray of shape \(2, 3\), ",
        ),
        (lambda f, z, state: z, r"must return \(z, f\(z\), state\) .*\(got a ndarray of shape \(2, 3\)\)"),
        (lambda f, z, state: None, r"Stepping.step must return .*\(got None\)"),
        (
            lambda f, z, state: (z, f(z)[:1], state),
            r"must return .* two arrays of shape \(2, 3\) \(got .*shape \(1, 3\), ",
        ),
        (lambda f, z, state: (0.0, f(z), state), r"a tuple of 3 \(a float, "),
    ],
)
def test_a_step_that_returns_something_else(wrong, words):
    WRONG["it"] = wrong
    options = {"forward__solver": "stepping", "forward__options": {"case": "it"}}
    with pytest.raises(PluginError, match=words):
        deqcore.fixed_point(lambda z: 0.5 * z + 1, np.zeros((2, 3)), **options)


@pytest.mark.parametrize("name", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            lambda g, r: g,
            r"AdjointSolving.solve_adjoint must return \(u, report\).*\(got a \w+ of shape \(2, 3\)\)",
        ),
        (
            lambda g, r: None,
            r"AdjointSolving.solve_adjoint must return .*deqcore.abc.backward.report.*\(got None\)",
        ),
        (lambda g, r: (g, 3), r"a tuple of 2 \(a \w+ of shape \(2, 3\), a int\)"),
        (
            lambda g, r: (g[:1], r),
            r"must return u of the cotangent's shape \(2, 3\) \(got a \w+ of shape \(1, 3\)\)",
        ),
        (
            lambda g, r: (g, r._replace(vjps=5)),
            r"\(report.vjps\) must return one number per sample.*\(got a int\)",
        ),
    ],
)
def test_a_route_that_returns_no_pair(name, wrong, words):
    if name == "torch":
        pytest.importorskip("torch")
    WRONG["it"] = wrong
    backend = deqcore.get_backend(backend=name)
    b = backend.asarray(np.ones((2, 3)))
    options = {"backward__strategy": "adjointsolving", "backward__options": {"case": "it"}}
    with pytest.raises(PluginError, match=words):
        deqcore.vjp(lambda z, b: 0.5 * z + b, 0 * b, b, cotangent=b, **options)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda value: value[:1], r"Valuing.value must return .* shape \(2, 3\).*\(got a ndarray of shape \(1, 3\)\)"),
        (lambda value: (value, None), r"Valuing.value must return .*\(got a tuple of 2"),
    ],
)
def test_steps_whose_value_is_no_state(wrong, words):
    WRONG["it"] = wrong
    options = {"backward__strategy": "valuing", "backward__options": {"case": "it"}}
    with pytest.raises(PluginError, match=words):
        deqcore.vjp(lambda z, b: 0.5 * z + b, np.zeros((2, 3)), np.ones((2, 3)), cotangent=np.ones((2, 3)), **options)
