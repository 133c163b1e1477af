"""A backward pass in a few numbers, and the sentences that report it."""

from __future__ import annotations

from typing import Any, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy
from deqcore.errors import ConvergenceError, ConvergenceWarning, CoupledRowsWarning
from deqcore.solution import Tally
from deqcore.solve.ledger import Ledger
from deqcore.solve.messages import coupling, failure
from deqcore.solve.user_line import Line, due, warn
from deqcore.types import AdjointReport, Array, Map, Status


class Pass(NamedTuple):
    """One backward pass, as the verification sees it.

    Attributes:
        backend: whose arrays these are.
        strategy: that found the gradient.
        on_failure: the setting.
        vjp: `u ↦ Jᵀu`, or None if the strategy does without.
        g: the cotangent `(batch, n)`.
    """

    backend: Backend
    strategy: Strategy
    on_failure: str
    vjp: Map | None
    g: Array


class Findings(NamedTuple):
    """What a verification found against a report.

    Attributes:
        coupled: whether f couples rows.
        wrong: samples whose residual contradicts the report.
        residual: the largest of these residuals.
        measured: whether the pass was verified.
        pair: two coupled rows, if they were looked for.
    """

    coupled: Any = False
    wrong: Any = 0
    residual: Any = 0.0
    measured: Any = False
    pair: tuple[int, int] | None = None


class AdjointTally(NamedTuple):
    """A backward pass in a few numbers, which may leave traced code.

    Attributes:
        solved: samples by status; those that did not fail count as CONVERGED.
        coupled: see `Findings`, and so are the rest.
        wrong: samples.
        residual: a residual.
        measured: a bool.
    """

    solved: Tally
    coupled: Any
    wrong: Any
    residual: Any
    measured: Any

    @classmethod
    def of(cls, xp: Any, report: AdjointReport, rows: Array, findings: Findings) -> AdjointTally:
        """Count a report of the array namespace `xp` whose failing samples are `rows` `(batch,)`."""
        status = xp.where(rows, report.status, xp.full_like(report.status, int(Status.CONVERGED)))
        known = xp.where(xp.isnan(report.residual), xp.full_like(report.residual, -float("inf")), report.residual)
        return cls(Tally.of(xp, status, report.vjps, known), *findings[:4])

    def notable(self) -> Any:
        """Return whether a sample failed, f couples rows, or a measurement must be noted."""
        return self.solved.failed() | self.coupled | self.measured

    def merged(self, xp: Any) -> AdjointTally:
        """Merge a stack of tallies, one per lane, into one."""
        return AdjointTally(
            self.solved.merged(xp),
            xp.any(self.coupled, axis=0),
            xp.sum(self.wrong, axis=0),
            xp.max(self.residual, axis=0),
            xp.any(self.measured, axis=0),
        )


def announce(
    tally: AdjointTally,
    counts: Ledger,
    strategy: Strategy,
    name: str,
    how: str,
    line: Line | None,
    pair: tuple[int, int] | None = None,
) -> None:
    """Raise, or warn at the 1st, 10th, 100th, … failing pass of a function.

    Args:
        tally: of the pass, on the host.
        counts: of the function.
        strategy: that found the gradient.
        name: under which it is registered.
        how: "warn" or "raise"; with anything else only coupled rows are reported.
        line: what the warning points at.
        pair: two coupled rows, if they are known.

    Raises:
        ConvergenceError: `how` is "raise" and a sample failed.
    """
    coupled, failed = bool(tally.coupled), how in ("warn", "raise") and bool(tally.solved.failed())
    if not coupled and not failed:
        return
    wrong = int(tally.wrong)
    if coupled:
        text = coupling(pair, wrong, int(tally.solved.samples.sum()), float(tally.residual))
    else:
        text = failure(tally.solved, strategy, name, how, wrong)
    if how == "raise" and failed:
        raise ConvergenceError(text)
    if coupled:
        if due(counts.coupled):
            warn(text, CoupledRowsWarning, line)
        counts.coupled += 1
    elif failed:
        if due(counts.failed):
            warn(text, ConvergenceWarning, line)
        counts.failed += 1
