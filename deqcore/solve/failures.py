"""Solves that fail: the schedule of verification, and the warning or error.

`Watch` verifies and reports backward passes in eager backends, in whatever thread the framework differentiates in.
`TracedWatch` does the same in traced code, where the numbers are known later: they leave it by `CallGuards.watch`.
`Failures` reports forward solves in traced code. All of them use the sentences of `deqcore.solve.messages`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy
from deqcore.errors import ConvergenceError, ConvergenceWarning, CoupledRowsWarning
from deqcore.solution import SAMPLES, SOLVED, Tally
from deqcore.solve.ledger import Account, Ledger
from deqcore.solve.messages import coupling, failure, promises
from deqcore.solve.user_line import Line, due, user_line, warn
from deqcore.solve.verification import coupled_pair, failing, leaking_pair, random_halves, traced_halves, verified
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
    def of(cls, xp: Any, report: AdjointReport, rows: Array, found: Findings) -> AdjointTally:
        """Count a report of the array namespace `xp` whose failing samples are `rows` `(batch,)`."""
        status = xp.where(rows, report.status, xp.full_like(report.status, int(Status.CONVERGED)))
        known = xp.where(xp.isnan(report.residual), xp.full_like(report.residual, -float("inf")), report.residual)
        return cls(Tally.of(xp, status, report.vjps, known), *found[:4])

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


class Watch:
    """Verifies the backward passes of one solve on schedule, and reports what failed. For eager backends.

    Args:
        account: where the counts of the function are.
        every: `backward.verify_every`.
        name: the strategy's registered name.
    """

    __slots__ = ("_account", "_ledger", "every", "line", "name")

    def __init__(self, account: Account, every: int, name: str) -> None:
        self._account = account
        self._ledger: Ledger | None = None
        self.every = every
        self.name = name
        self.line = user_line()

    @property
    def ledger(self) -> Ledger:
        """Counts of the layer or function, looked for when the first backward pass runs."""
        if self._ledger is None:
            self._ledger = self._account.ledger
        return self._ledger

    def verify(
        self, job: Pass, u: Array, report: AdjointReport, turn: Array | None
    ) -> tuple[AdjointReport, Findings | None]:
        """Return the report, measured if it is this pass's turn, and what contradicts it."""
        count, counts = self.ledger.count(), self.ledger
        due_now = self.every and (count % self.every == 0 or counts.suspect)
        if not due_now or job.vjp is None:
            return report, None
        backend, g = job.backend, job.g
        halves = random_halves(g.shape[0], g.shape[1], seed=count)
        with backend.errstate():
            true = verified(backend, job.strategy, job.vjp, g, u, report, halves)
        found = self._findings(backend, report, true)
        counts.suspect = found is not None
        if found is not None and found.coupled and job.on_failure != "ignore" and due(counts.coupled):
            row = int(np.argmax(backend.to_numpy(true.coupling)))
            found = found._replace(pair=coupled_pair(backend, job.vjp, halves, g, row))
            spent = 2 + max(int(halves.rows.sum()) - 1, 0).bit_length()
            true = true._replace(verify_vjps=backend.xp.zeros_like(true.vjps) + spent)
        elif found is not None and not found.coupled and job.on_failure != "ignore" and due(counts.failed):
            true, found = self._searched(job, true, found)
        return true, found

    def _searched(self, job: Pass, true: AdjointReport, found: Findings) -> tuple[AdjointReport, Findings]:
        """Search for a pair of coupled rows that the random half did not separate, and add it to the findings."""
        backend = job.backend
        assert job.vjp is not None
        pair, coupling, spent = leaking_pair(backend, job.vjp, job.g)
        true = true._replace(verify_vjps=true.verify_vjps + spent)
        if pair is None:
            return true, found
        return true._replace(coupling=backend.cast(coupling, true.residual)), found._replace(coupled=True, pair=pair)

    def verify_steps(self, find: Callable[[], tuple[int, int] | None]) -> None:
        """Warn on schedule if f couples rows, for a strategy that differentiates through steps.

        Args:
            find: looks for a pair of coupled rows.
        """
        count, counts = self.ledger.count(), self.ledger
        if not self.every or not (count % self.every == 0 or counts.suspect):
            return
        if counts.suspect and not due(counts.coupled):
            counts.coupled += 1
            return
        pair = find()
        counts.suspect = pair is not None
        if pair is not None:
            warn(coupling(pair), CoupledRowsWarning, self.line)
            counts.coupled += 1

    def _findings(self, backend: Backend, report: AdjointReport, true: AdjointReport) -> Findings | None:
        wrong = backend.to_numpy(true.status != report.status)
        coupled = bool((backend.to_numpy(true.coupling) > 0).any())
        if not coupled and not wrong.any():
            return None
        residual = backend.to_numpy(true.residual)
        return Findings(coupled, int(wrong.sum()), float(residual[wrong].max(initial=0.0)), True)

    def deliver(self, job: Pass, report: AdjointReport, found: Findings | None) -> None:
        """Warn or raise.

        Raises:
            ConvergenceError: `on_failure` is "raise" and a sample failed.
        """
        how, found = job.on_failure, found or Findings()
        if how == "ignore":
            return
        failed = how in ("warn", "raise") and self._failed(job, report)
        if not failed and not found.coupled:
            return
        backend = job.backend
        host = report._replace(**{name: backend.to_numpy(getattr(report, name)) for name in report._fields[:5]})
        rows = backend.to_numpy(failing(backend, report, job.g))
        tally = AdjointTally.of(np, host, rows, found)
        announce(tally, self.ledger, job.strategy, self.name, how, self.line, found.pair)

    def coupled_forward(self, find: Callable[[], tuple[int, int] | None]) -> bool:
        """Warn of a forward solve whose values differ because the rows of other samples moved.

        Args:
            find: looks for a pair of coupled rows; it is called as rarely as the warning is shown.

        Returns:
            Whether f couples rows.
        """
        counts = self.ledger
        if counts.suspect and not due(counts.forward):
            counts.forward += 1
            return True
        pair = find()
        if pair is None:
            return False
        counts.suspect = True
        if due(counts.forward):
            warn(coupling(pair), CoupledRowsWarning, self.line)
        counts.forward += 1
        return True

    def _failed(self, job: Pass, report: AdjointReport) -> bool:
        """Return whether a sample failed. Wait for a device only if the strategy promises an accuracy."""
        backend = job.backend
        status = backend.host.numpy_view(report.status)
        if status is not None and (status == int(Status.CONVERGED)).all():
            return False
        if status is None and not promises(job.strategy):
            return False
        return bool(backend.to_numpy(failing(backend, report, job.g)).any())


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
        found = Findings(
            coupled=xp.any(true.coupling > 0),
            wrong=xp.sum(xp.astype(wrong, xp.int32)),
            residual=xp.max(residual),
            measured=wanted & (turn is not None),
        )
        return true, found

    def deliver(self, job: Pass, report: AdjointReport, found: Findings | None) -> None:
        """Let `CallGuards.watch` report the pass."""
        if not self.reports or not job.g.shape[0]:
            return
        backend, xp = job.backend, job.backend.xp
        if found is None:
            no = xp.zeros_like(report.status[0]) > 0
            found = Findings(no, xp.zeros_like(report.status[0]), xp.zeros_like(report.residual[0]), no)
        tally = AdjointTally.of(xp, report, failing(backend, report, job.g), found)
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
    return xp.astype(xp.floor((size / backend.power_of_two(size) - 1.0) * 2.0**22), xp.int32)


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
