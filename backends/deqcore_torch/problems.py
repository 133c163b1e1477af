"""Problems by number: compiled code carries the number of a layer or of a captured function, not the object.

Every layer gets a number when it is made. So this module is light, and the operator is loaded by the first compilation.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from deqcore.solution import Solution


class OperatorProblem(Protocol):
    """A layer or a captured function, which an operator solves for tensors."""

    def rows(self, layout: str, state: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return the shape of the report for the leaves of the initial iterate: that of samples, or of units."""

    def run(self, layout: str, tensors: list[Tensor], warm: bool) -> tuple[Solution, list[Tensor]]:
        """Return the solution for tensors arranged by `layout`, and the leaves of its value."""


numbered: dict[int, OperatorProblem] = {}
_numbers = itertools.count(1)


def register(problem: OperatorProblem, owner: object) -> int:
    """Return a new number, by which compiled code finds the problem while `owner` exists."""
    number = next(_numbers)
    numbered[number] = problem
    weakref.finalize(owner, numbered.pop, number, None).atexit = False
    return number
