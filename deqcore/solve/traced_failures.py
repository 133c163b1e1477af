"""Failed samples in traced code, forward and backward.

The numbers are known later, when the program runs; they leave it by `CallGuards.watch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy
from deqcore.errors import ConvergenceError, ConvergenceWarning
from deqcore.solution import SAMPLES, SOLVED, Tally
from deqcore.solve.adjoint_tally import AdjointTally, Findings, Pass, announce
from deqcore.solve.ledger import Account
from deqcore.solve.user_line import Line, due, user_line, warn
from deqcore.solve.verification import failing, traced_halves, verified
from deqcore.types import AdjointReport, Array


@dataclass(frozen=True)
class TracedWatch:
    """Verifies backward passes in traced code, and reports what failed. It is a part of the key of compiled code.

    Attributes:
        account: where the counts of the function are.
        every: `backward.verify_every`.
        name: the strategy's registered name.
        asked_to_report: whether a setting asks for warnings or errors, so that compiled code may hold a callback.
        asked_to_verify: whether a setting asks for measurements.
        reports: whether the program reports, see `compiled`.
        verifies: whether the program measures.
        line: what a warning points at.
    """

    account: Account = field(compare=False, repr=False)
    every: int
    name: str
    asked_to_report: bool = False
    asked_to_verify: bool = False
    reports: bool = False
    verifies: bool = False
    line: Line | None = None

    def compiled(self, on_failure: str, *, staged: bool, observed: bool) -> TracedWatch:
        """Return the checks to compile into the program, see `AdjointSolver.compiled`."""
        asked = not staged or self.asked_to_report or self.asked_to_verify
        reports = on_failure in ("warn", "raise") and asked
        wanted = observed or (self.asked_to_verify if staged else on_failure != "ignore")
        line = user_line() if reports else None
        # The key leaves out the settings that decide this, because other settings give the same program.
        return TracedWatch(
            self.account, self.every, self.name, reports=reports, verifies=wanted and self.every > 0, line=line
        )

    def turn(self) -> int:
        """See `AdjointSolver.turn`. Until a pass was measured every call is due: no call knows that a pass will run."""
        counts = self.account.ledger
        count = counts.count()
        wanted = counts.suspect or count % self.every == 0 or (self.reports and not counts.verified)
        counts.suspect = False  # until the measurement says so again
        return count % 2**31 if wanted else -1

    def verify(
        self, job: Pass, u: Array, report: AdjointReport, turn: Array | None
    ) -> tuple[AdjointReport, Findings | None]:
        """Return the report, measured if it is this pass's turn, and what contradicts it."""
        if not self.verifies or job.vjp is None or 0 in job.g.shape:
            return report, None
        backend, g, vjp, xp = job.backend, job.g, job.vjp, job.backend.xp
        report = report._replace(
            coupling=xp.full_like(report.residual, float("nan")), verify_vjps=xp.zeros_like(report.vjps)
        )
        if turn is None:
            seed = _digits(backend, g, u)
            wanted = seed % self.every == 0
        else:
            seed, wanted = turn, turn >= 0
        halves = traced_halves(backend, g, seed)
        measure = lambda report: verified(backend, job.strategy, vjp, g, u, report, halves)  # noqa: E731
        true = backend.cond(xp.reshape(wanted, (1,)), measure, report)
        wrong = true.status != report.status
        residual = xp.where(wrong, true.residual, xp.zeros_like(true.residual))
        findings = Findings(
            coupled=xp.any(true.coupling > 0),
            wrong=xp.sum(xp.astype(wrong, xp.int32)),
            residual=xp.max(residual),
            measured=wanted & (turn is not None),
        )
        return true, findings

    def deliver(self, job: Pass, report: AdjointReport, findings: Findings | None) -> None:
        """Let `CallGuards.watch` report the pass."""
        if not self.reports or not job.g.shape[0]:
            return
        backend, xp = job.backend, job.backend.xp
        if findings is None:
            no = xp.zeros_like(report.status[0]) > 0
            findings = Findings(no, xp.zeros_like(report.status[0]), xp.zeros_like(report.residual[0]), no)
        tally = AdjointTally.of(xp, report, failing(backend, report, job.g), findings)
        strategy, how = job.strategy, job.on_failure
        backend.guards.watch(lambda figures: self._announce(figures, strategy, how), tally, compiled=True)

    def _announce(self, tally: AdjointTally, strategy: Strategy, how: str) -> None:
        counts = self.account.ledger
        if bool(tally.measured):
            counts.verified, counts.suspect = True, bool(tally.coupled) or int(tally.wrong) > 0
        announce(tally, counts, strategy, self.name, how, self.line)


def _digits(backend: Backend, g: Array, u: Array) -> Array:
    """Return an integer from the last digits of the norms of g and u: compiled code cannot count its runs."""
    xp = backend.xp
    size = xp.sum(backend.to_accum_dtype(backend.norm(g))) + xp.sum(backend.to_accum_dtype(backend.norm(u)))
    size = xp.where((size > 0) & xp.isfinite(size), size, xp.ones_like(size))
    return xp.astype(xp.floor((size / backend.numbers.power_of_two(size) - 1.0) * 2.0**22), xp.int32)


class Failures:
    """What to do when samples of a forward solve fail in traced code: raise each time, or warn at the 1st, 10th, … run.

    Args:
        action: "raise" or "warn".
        circumstances: the end of the message.
        solver: the solver in use, which the message does not recommend.
        noun: of what is counted.

    Raises:
        ConvergenceError: (when called) the action is "raise".

    Example:
        >>> import numpy as np
        >>> from deqcore.solution import Tally
        >>> failures = Failures("raise")
        >>> failures(Tally.of(np, np.array([1, 2]), np.array([3, 9]), np.array([0.0, 0.5])))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        deqcore.errors.ConvergenceError: 1 of 2 samples MAX_STEPS after at most 9 steps...
    """

    def __init__(self, action: str, circumstances: str = "", solver: str = "", noun: str = SAMPLES) -> None:
        self.action, self.circumstances, self.solver, self.noun = action, circumstances, solver, noun
        self.line = user_line()
        self.runs = 0

    def __call__(self, tally: Tally) -> None:
        """Report one run in which samples failed."""
        self.runs += 1
        text = f"{tally.lines(SOLVED, self.solver, failed_first=True, noun=self.noun)}{self.circumstances}"
        if self.action == "raise":
            raise ConvergenceError(text)
        if due(self.runs - 1):
            more = f" This is the {self.runs}th run of the compiled program that failed." if self.runs > 1 else ""
            warn(text + more, ConvergenceWarning, self.line)
