"""Tools that check an implementation: golden problems, gradient checks, conformance tests, the strict backend.

For users: `Problem`, your function for `deqcore check gradients --problem`, with `weights` from a file, and
the pytest fixture `check_gradients` of `deqcore.testing.pytest_gradients`. For authors of plugins:
`BackendTests`, `SolverTests`, `StrategyTests` and `SinkTests`, base classes of test cases.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from deqcore.testing.problem import Problem
    from deqcore.testing.problems import golden
    from deqcore.testing.suite.backend.tests import BackendTests
    from deqcore.testing.suite.sink.tests import SinkTests
    from deqcore.testing.suite.solver.tests import SolverTests
    from deqcore.testing.suite.strategy.tests import StrategyTests
    from deqcore.testing.weights import weights

_HOME: Final = {
    "BackendTests": "deqcore.testing.suite.backend.tests",
    "Problem": "deqcore.testing.problem",
    "SinkTests": "deqcore.testing.suite.sink.tests",
    "SolverTests": "deqcore.testing.suite.solver.tests",
    "StrategyTests": "deqcore.testing.suite.strategy.tests",
    "golden": "deqcore.testing.problems",
    "weights": "deqcore.testing.weights",
}

__all__ = ["BackendTests", "Problem", "SinkTests", "SolverTests", "StrategyTests", "golden", "weights"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'deqcore.testing' has no attribute {name!r}")
    if name.endswith("Tests"):
        import_module("deqcore.testing.suite.base")  # raises an error that says what to install where pytest is missing
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
