"""The second solver of the tutorial, which evaluates f three times a step, passes the suite."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import deqcore
from deqcore import plugins
from deqcore.testing import SolverTests

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "custom_solver" / "extrapolation.py"
spec = importlib.util.spec_from_file_location("extrapolation_example", FILE)
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])


@pytest.fixture(autouse=True)
def registered():
    if "reduced-rank" not in plugins.solvers():
        plugins.register(plugins.SolverSpec("reduced-rank", "extrapolation_example:ReducedRank", summary="RRE(2)"))


class TestReducedRank(SolverTests):
    backends = ("numpy", "strict")
    solvers = ("reduced-rank",)
    options: ClassVar = {}


def test_two_eigenvalues_are_solved_in_a_step():
    """RRE of order k is exact for a linear f whose residual lies in k eigenvectors."""
    rates = np.array([[0.9, -0.8, 0.9], [0.5, 0.99, 0.5]])
    sol = deqcore.fixed_point(lambda z: rates * z + 1.0, np.zeros((2, 3)), forward__solver="reduced-rank")
    assert sol.steps.tolist() == [1, 1]
    assert sol.evaluations.tolist() == [4, 4]
    assert np.allclose(sol.value, 1 / (1 - rates), rtol=1e-8)


def test_the_page_shows_the_file():
    page = (ROOT / "docs" / "tutorials" / "solver.md").read_text()
    (block,) = re.findall(r"`extrapolation.py`:\n\n```python\n(.*?)```", page, re.S)
    assert block == FILE.read_text()
