"""Backward passes of eager backends: the schedule of their verification, and the warning or error.

`traced_failures` does the same in traced code. Both use the sentences of `deqcore.solve.messages`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.errors import CoupledRowsWarning
from deqcore.solve.adjoint_tally import AdjointTally, Findings, Pass, announce
from deqcore.solve.ledger import Account, Ledger
from deqcore.solve.messages import coupling, promises
from deqcore.solve.user_line import due, user_line, warn
from deqcore.solve.verification import coupled_pair, failing, leaking_pair, random_halves, verified
from deqcore.types import AdjointReport, Array, Status


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
        findings = self._findings(backend, report, true)
        counts.suspect = findings is not None
        if findings is not None and findings.coupled and job.on_failure != "ignore" and due(counts.coupled):
            row = int(np.argmax(backend.to_numpy(true.coupling)))
            findings = findings._replace(pair=coupled_pair(backend, job.vjp, halves, g, row))
            spent = 2 + max(int(halves.rows.sum()) - 1, 0).bit_length()
            true = true._replace(verify_vjps=backend.xp.zeros_like(true.vjps) + spent)
        elif findings is not None and not findings.coupled and job.on_failure != "ignore" and due(counts.failed):
            true, findings = self._searched(job, true, findings)
        return true, findings

    def _searched(self, job: Pass, true: AdjointReport, findings: Findings) -> tuple[AdjointReport, Findings]:
        """Search for a pair of coupled rows that the random half did not separate, and add it to the findings."""
        backend = job.backend
        assert job.vjp is not None
        pair, coupling, spent = leaking_pair(backend, job.vjp, job.g)
        true = true._replace(verify_vjps=true.verify_vjps + spent)
        if pair is None:
            return true, findings
        return true._replace(coupling=backend.cast(coupling, true.residual)), findings._replace(coupled=True, pair=pair)

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

    def deliver(self, job: Pass, report: AdjointReport, findings: Findings | None) -> None:
        """Warn or raise.

        Raises:
            ConvergenceError: `on_failure` is "raise" and a sample failed.
        """
        how, findings = job.on_failure, findings or Findings()
        if how == "ignore":
            return
        failed = how in ("warn", "raise") and self._failed(job, report)
        if not failed and not findings.coupled:
            return
        backend = job.backend
        host = report._replace(**{name: backend.to_numpy(getattr(report, name)) for name in report._fields[:5]})
        rows = backend.to_numpy(failing(backend, report, job.g))
        tally = AdjointTally.of(np, host, rows, findings)
        announce(tally, self.ledger, job.strategy, self.name, how, self.line, findings.pair)

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
