"""Report samples that did not converge when their numbers are known only later: in a callback from compiled code."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field
from typing import Any, Final

from deqcore.errors import ConvergenceError, ConvergenceWarning
from deqcore.solution import Tally

FRAMEWORKS: Final = frozenset({"jax", "equinox", "flax", "contextlib"})


@dataclass(frozen=True)
class Place:
    """A line of the user's code, for a warning that is given after the line has run."""

    filename: str
    line: int
    registry: dict[Any, Any] = field(repr=False, compare=False)

    @classmethod
    def caller(cls) -> Place:
        """The innermost frame outside this package and the frameworks that call it."""
        frame = sys._getframe(1)
        while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
            frame = frame.f_back
        return cls(frame.f_code.co_filename, frame.f_lineno, frame.f_globals.setdefault("__warningregistry__", {}))


def _is_ours(module: str) -> bool:
    package = module.partition(".")[0]
    return package.startswith("deqcore") or package in FRAMEWORKS


class Failures:
    """What to do when samples fail: raise each time, or warn at the 1st, 10th, 100th, … failing run.

    Args:
        action: "raise" or "warn".
        template: the line for a status, as in `Tally.lines`.
        before: the beginning of the message.
        after: its end.
        place: what a warning points at; default: the caller's line.
        solver: the solver in use, which the message does not recommend.

    Raises:
        ConvergenceError: (when called) the action is "raise".

    Example:
        >>> import numpy as np
        >>> from deqcore.solution import Tally
        >>> failures = Failures("raise", "after {steps} steps.")
        >>> failures(Tally.of(np, np.array([1, 2]), np.array([3, 9]), np.array([0.0, 0.5])))
        Traceback (most recent call last):
        ...
        deqcore.errors.ConvergenceError: 1 of 2 samples CONVERGED after 3 steps.
        1 of 2 samples MAX_STEPS after 9 steps.
    """

    def __init__(
        self,
        action: str,
        template: str,
        before: str = "",
        after: str = "",
        place: Place | None = None,
        solver: str = "",
    ) -> None:
        self.action, self.template, self.before, self.after, self.solver = action, template, before, after, solver
        self.place = Place.caller() if place is None else place
        self.runs = 0

    def __call__(self, tally: Tally) -> None:
        """Report one run in which samples failed."""
        self.runs += 1
        text = f"{self.before}{tally.lines(self.template, self.solver)}{self.after}"
        if self.action == "raise":
            raise ConvergenceError(text)
        if str(self.runs).strip("0") != "1":  # 1, 10, 100, …
            return
        if self.runs > 1:
            text += f" This is the {self.runs}th run of the compiled program that failed."
        place = self.place
        warnings.warn_explicit(text, ConvergenceWarning, place.filename, place.line, registry=place.registry)
