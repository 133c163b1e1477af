"""Tools that check an implementation: golden problems, gradient checks, conformance tests, the strict backend.

For users: `Problem`, your function for `deqcore check gradients --problem`, with `weights` from a file, and
the pytest fixture `check_gradients` of `deqcore.testing.pytest_gradients`. For authors of plugins:
`BackendTests`, `SolverTests`, `StrategyTests` and `SinkTests`, base classes of test cases.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deqcore.lazy import lazy_names

if TYPE_CHECKING:
    from deqcore.testing.problem import Problem
    from deqcore.testing.problems import golden
    from deqcore.testing.suite.backend.tests import BackendTests
    from deqcore.testing.suite.sink.tests import SinkTests
    from deqcore.testing.suite.solver.tests import SolverTests
    from deqcore.testing.suite.strategy.tests import StrategyTests
    from deqcore.testing.weights import weights

__all__ = ["BackendTests", "Problem", "SinkTests", "SolverTests", "StrategyTests", "golden", "weights"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "deqcore.testing.problem": ["Problem"],
        "deqcore.testing.problems": ["golden"],
        "deqcore.testing.suite.backend.tests": ["BackendTests"],
        "deqcore.testing.suite.sink.tests": ["SinkTests"],
        "deqcore.testing.suite.solver.tests": ["SolverTests"],
        "deqcore.testing.suite.strategy.tests": ["StrategyTests"],
        "deqcore.testing.weights": ["weights"],
    },
)
