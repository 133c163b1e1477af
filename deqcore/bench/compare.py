"""Contenders on cases, at equal residual: seconds, evaluations, overhead, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from deqcore.bench.cases import Case
from deqcore.bench.harness import Contender, Harness, Outcome, Ready, residuals
from deqcore.bench.machine import peak_memory
from deqcore.bench.timing import Clock, Rounds, Spread, interleave

FINEST, COARSEST, PER_DECADE = -4, 4, 4  # tolerances that are tried, in decades around the residual asked for


@dataclass(frozen=True)
class Row:
    """One contender on one case.

    Attributes:
        evaluations: of f for the whole batch, per solve.
        residual_max: over the batch, of the returned state, see `harness.residuals`.
        residual_median: the same, median.
        reached: whether every sample reached the residual that the case asks for.
        tolerance: what the contender was given in its own norm.
        first_seconds: the first call, compilation included.
        memory: bytes by which the process grew during a solve; None where unknown.
        state: bytes of one state.
        seconds: per kept round.
        reference: seconds per stand-alone evaluation of f beside it, per kept round.
        disturbance: share of the machine that others used, per kept round.
        dropped: rounds left out for disturbance.
    """

    framework: str
    case: str
    contender: str
    evaluations: int
    residual_max: float
    residual_median: float
    reached: bool
    tolerance: float
    first_seconds: float
    memory: int | None
    state: int
    seconds: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    disturbance: list[float] = field(default_factory=list)
    dropped: int = 0

    @property
    def overhead(self) -> Spread:
        """Seconds / (evaluations × seconds per f), paired by round; 1.0 is the limit of eager code."""
        pairs = zip(self.seconds, self.reference, strict=True)
        return Spread.of([s / (max(1, self.evaluations) * r) for s, r in pairs])

    def against(self, other: Row) -> Spread:
        """Seconds of this over seconds of another row of the same comparison, paired by round."""
        return Spread.of([a / b for a, b in zip(self.seconds, other.seconds, strict=True)])

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def compare(
    harness: Harness,
    case: Case,
    contenders: Sequence[Contender],
    *,
    rounds: int = 9,
    budget: float = 60.0,
    clock: Clock = time.perf_counter,
    memory: bool = True,
    say: Callable[[str], object] = lambda _: None,
) -> list[Row]:
    """Measure all contenders on one case, interleaved.

    Contenders with a norm of their own get the loosest tolerance with which every sample of the state they return
    reaches the case's residual. Those that never reach it are listed, but not timed.

    Args:
        harness: the framework.
        case: problem, residual, step budget.
        contenders: who takes part.
        rounds: of timing.
        budget: see `timing.interleave`.
        clock: see `timing.interleave`.
        memory: whether to measure peak memory.
        say: told what is being done.
    """
    ready = harness.ready(case)
    rows: list[Row] = []
    tasks: dict[str, Callable[[], Outcome]] = {}
    for contender in contenders:
        say(f"{harness.name}: {case.name}: {contender.name}")
        row, run = _settle(harness, ready, contender, memory)
        rows.append(row)
        if row.reached:
            tasks[contender.name] = run
    if not tasks:
        return rows
    say(f"{harness.name}: {case.name}: timing")
    found = interleave(tasks, evaluation(harness, ready), rounds=rounds, budget=budget, clock=clock)
    return [_timed(row, found) if row.contender in tasks else row for row in rows]


def _timed(row: Row, found: Rounds) -> Row:
    return replace(
        row,
        seconds=found.seconds[row.contender],
        reference=found.reference[row.contender],
        disturbance=found.disturbance,
        dropped=found.dropped,
    )


def evaluation(harness: Harness, ready: Ready) -> Callable[[], object]:
    """One stand-alone evaluation of f at a point that is not special, to time."""
    compiled = harness.jit(ready.f)
    z = ready.f(ready.z0, ready.params, ready.inputs)

    def run() -> None:
        with harness.quiet():
            harness.block(compiled(z, ready.params, ready.inputs))

    run()
    return run


def _settle(harness: Harness, ready: Ready, contender: Contender, memory: bool) -> tuple[Row, Callable[[], Outcome]]:
    """Find the tolerance, warm up, count."""
    case = ready.case
    tolerance = _tolerance(harness, ready, contender)
    counted = ready if harness.traced else ready.counted()
    outcome = contender.prepare(harness, counted, tolerance, case.max_steps)()
    reached = residuals(harness, ready, outcome.value)
    count = counted.calls[0] if outcome.evaluations is None else int(np.max(np.asarray(outcome.evaluations)))
    run = contender.prepare(harness, ready, tolerance, case.max_steps)
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    row = Row(
        framework=harness.name,
        case=case.name,
        contender=contender.name,
        evaluations=count,
        residual_max=float(reached.max()),
        residual_median=float(np.median(reached)),
        reached=bool(reached.max() <= case.rtol * (1 + 1e-3)),
        tolerance=tolerance,
        first_seconds=first,
        memory=peak_memory(run) if memory else None,
        state=int(harness.to_numpy(ready.z0).nbytes),
    )
    return row, run


def _tolerance(harness: Harness, ready: Ready, contender: Contender) -> float:
    """The case's own for a contender of the common norm.

    It bounds ‖f(z) − z‖ where f(z) is returned: where f(z) is
    worse than z, the returned state needs a finer one, as others' do.
    """
    rtol = ready.case.rtol
    if contender.exact:
        value = contender.prepare(harness, ready, rtol, ready.case.max_steps)().value
        if residuals(harness, ready, value).max() <= rtol:
            return rtol
    return tune(harness, ready, contender)


def tune(harness: Harness, ready: Ready, contender: Contender) -> float:
    """The loosest tolerance with which every sample reaches the case's residual; the finest tried if none does."""
    case = ready.case
    grid = case.rtol * 10.0 ** (np.arange(FINEST * PER_DECADE, COARSEST * PER_DECADE + 1) / PER_DECADE)

    def enough(tolerance: float) -> bool:
        value = contender.prepare(harness, ready, tolerance, case.max_steps)().value
        return bool(residuals(harness, ready, value).max() <= case.rtol)

    low, high = 0, len(grid)  # grid[low - 1] is fine enough, grid[high] is not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if enough(float(grid[middle])) else (low, middle)
    return float(grid[max(0, low - 1)])


def trajectory(
    harness: Harness, case: Case, contender: Contender, budgets: Iterable[int], repeats: int = 3
) -> list[dict[str, Any]]:
    """Residual against evaluations and seconds: solves with growing budgets and no tolerance."""
    ready = harness.ready(case)
    points: list[dict[str, Any]] = []
    for budget in budgets:
        counted = ready if harness.traced else ready.counted()
        outcome = contender.prepare(harness, counted, 0.0, budget)()
        evaluations = outcome.evaluations
        run = contender.prepare(harness, ready, 0.0, budget)
        run()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        points.append(
            {
                "budget": budget,
                "evaluations": counted.calls[0] if evaluations is None else int(np.max(np.asarray(evaluations))),
                "residual": float(residuals(harness, ready, outcome.value).max()),
                "seconds": min(seconds),
            }
        )
    return points
