"""Contenders on cases, at equal residual: seconds, evaluations, overhead, memory."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import numpy as np

from deqcore.bench.cases import Case
from deqcore.bench.harness import Contender, Harness, Ready, SolveFunction, SolveOutcome, residuals
from deqcore.bench.rows import BenchRow
from deqcore.bench.timing import Clock, Rounds, interleave
from deqcore.errors import DtypeToleranceWarning
from deqcore.types import Array

FINEST: Final = -4  # tolerances that are tried, in decades around the residual asked for
COARSEST: Final = 4
PER_DECADE: Final = 4
NEAR: Final = (0.0, 0.25, 0.5, 1.0, 2.0)
PATIENCE: Final = 8.0  # seconds of one solve, beyond which a contender is not searched for
FIRST_PATIENCE: Final = 60.0  # of the first solve, which may import and compile
ROUNDING: Final = 1e-3  # the residual is measured in float64, the solve in float32

Say = Callable[[str], object]


def silent(_: str) -> None:
    """Discard a message."""


def compare(
    harness: Harness,
    case: Case,
    contenders: Sequence[Contender],
    *,
    rounds: int = 9,
    budget: float = 60.0,
    clock: Clock = time.perf_counter,
    memory: bool = True,
    say: Say = silent,
) -> list[BenchRow]:
    """Measure all contenders on one case, interleaved.

    Contenders with their own norm get the loosest tolerance with which every sample of the state they return
    reaches the case's residual. Those that never reach it, or raise, are listed with the reason, but not timed.

    Args:
        harness: the framework.
        case: problem, residual, step budget.
        contenders: who takes part.
        rounds: of timing.
        budget: see `timing.interleave`.
        clock: see `timing.interleave`.
        memory: whether to measure peak memory.
        say: takes messages on progress.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DtypeToleranceWarning)  # the search tries tolerances that are too fine
        return _compare(harness, case, contenders, rounds, budget, clock, memory, say)


def _compare(
    harness: Harness,
    case: Case,
    contenders: Sequence[Contender],
    rounds: int,
    budget: float,
    clock: Clock,
    memory: bool,
    say: Say,
) -> list[BenchRow]:
    ready = harness.ready(case)
    rows: list[BenchRow] = []
    tasks: dict[str, Callable[[], SolveOutcome]] = {}
    for contender in contenders:
        say(f"{harness.name}: {case.name}: {contender.name}")
        try:
            row, run = _settle(harness, ready, contender, memory)
        except Exception as error:  # whatever a library raises is a result, and costs the others nothing
            rows.append(_failed(harness, ready, contender, error))
            continue
        rows.append(row)
        if row.reached:
            tasks[contender.name] = run
    if not tasks:
        return rows
    say(f"{harness.name}: {case.name}: timing")
    result = interleave(tasks, evaluation(harness, ready), rounds=rounds, budget=budget, clock=clock)
    return [_timed(row, result, harness.queued) if row.contender in tasks else row for row in rows]


def _timed(row: BenchRow, rounds: Rounds, queued: int) -> BenchRow:
    return replace(
        row,
        seconds=rounds.seconds[row.contender],
        reference=[item / queued for item in rounds.reference[row.contender]],
        disturbance=rounds.disturbance,
        dropped=rounds.dropped,
    )


def _failed(harness: Harness, ready: Ready, contender: Contender, error: Exception) -> BenchRow:
    unknown = float("nan")
    text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return BenchRow(
        framework=harness.name,
        case=ready.case.name,
        contender=contender.name,
        evaluations=0,
        residual_max=unknown,
        residual_median=unknown,
        reached=False,
        tolerance=unknown,
        first_seconds=unknown,
        memory=None,
        state=_bytes(harness, ready.z0),
        error=text,
    )


def evaluation(harness: Harness, ready: Ready) -> Callable[[], object]:
    """`harness.queued` stand-alone evaluations of f at a point that is not special, to time."""
    compiled = harness.jit(ready.f)
    z = ready.f(ready.z0, ready.params, ready.inputs)

    def run() -> None:
        with harness.quiet():
            for _ in range(harness.queued):
                image = compiled(z, ready.params, ready.inputs)
            harness.block(image)

    run()
    return run


def _settle(
    harness: Harness, ready: Ready, contender: Contender, memory: bool
) -> tuple[BenchRow, Callable[[], SolveOutcome]]:
    """Warm up, find the tolerance, count."""
    case = ready.case
    solve = contender.prepare(harness, ready, case.max_steps)
    with _limited(FIRST_PATIENCE):
        first = _seconds(solve, case.rtol)
    if first > PATIENCE and (again := _seconds(solve, case.rtol)) > PATIENCE:  # imports and compilation are forgiven
        raise TimeoutError(f"not run: a solve took {again:.0f} s, but must take at most {PATIENCE:.0f} s.")
    tolerance = _tolerance(harness, ready, contender, solve)

    def run() -> SolveOutcome:
        return solve(tolerance)

    count, value = counted(harness, ready, contender, solve, tolerance, case.max_steps)
    residual = residuals(harness, ready, value)
    reached = bool(residual.max() <= case.rtol * (1 + ROUNDING))
    row = BenchRow(
        framework=harness.name,
        case=case.name,
        contender=contender.name,
        evaluations=count,
        residual_max=float(residual.max()),
        residual_median=float(np.median(residual)),
        reached=reached,
        tolerance=tolerance,
        first_seconds=first,
        memory=harness.peak(run) if memory and reached else None,
        state=_bytes(harness, ready.z0),
    )
    return row, run


def _bytes(harness: Harness, z: Array) -> int:
    """Return the bytes of a state as the framework holds it, if it has `nbytes`: NumPy has no bfloat16."""
    return int(getattr(z, "nbytes", None) or harness.to_numpy(z).nbytes)


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError from Python code that runs longer, in the main thread of systems with interval timers."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not run: a solve took more than {seconds:.0f} s, but must take at most {PATIENCE:.0f} s.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _seconds(solve: SolveFunction, tolerance: float) -> float:
    start = time.perf_counter()
    solve(tolerance)
    return time.perf_counter() - start


def counted(
    harness: Harness, ready: Ready, contender: Contender, solve: SolveFunction, tolerance: float, max_steps: int
) -> tuple[int, Array]:
    """Return the evaluations of f in one solve, and its value: counted from outside where f is called eagerly.

    Calls miss the products J v of a Newton method, which the library counts; compiled code shows no calls at all.
    """
    if harness.traced:
        result = solve(tolerance)
        return result.evaluations or 0, result.value
    watched = ready.counted()
    result = contender.prepare(harness, watched, max_steps)(tolerance)
    return max(watched.calls[0], result.evaluations or 0), result.value


def _tolerance(harness: Harness, ready: Ready, contender: Contender, solve: SolveFunction) -> float:
    """Return the case's own for a contender of the common norm.

    It bounds ‖f(z) − z‖ where f(z) is returned: where f(z) is
    worse than z, the returned state needs a finer one, as others' do.
    """
    rtol = ready.case.rtol
    if contender.exact and residuals(harness, ready, solve(rtol).value).max() <= rtol * (1 + ROUNDING):
        return rtol
    return tune(harness, ready, solve, few=contender.recompiles)


def tune(harness: Harness, ready: Ready, solve: SolveFunction, few: bool = False) -> float:
    """Return the loosest tolerance with which every sample reaches the case's residual; the finest tried if none does.

    Args:
        harness: the framework.
        ready: the case.
        solve: of the contender.
        few: try the case's own tolerance and a few finer ones, instead of a search over all decades.
    """
    rtol = ready.case.rtol
    grid: list[float] = [rtol * 10.0 ** (k / PER_DECADE) for k in range(FINEST * PER_DECADE, COARSEST * PER_DECADE + 1)]

    def enough(tolerance: float) -> bool:
        return bool(residuals(harness, ready, solve(tolerance).value).max() <= rtol)

    if few:
        near: list[float] = [rtol * 10.0**-decades for decades in NEAR]
        return next((tolerance for tolerance in near if enough(tolerance)), near[-1])
    if not enough(grid[0]):
        return grid[0]
    low, high = 1, len(grid)  # grid[low - 1] is fine enough, grid[high] is not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if enough(grid[middle]) else (low, middle)
    return grid[max(0, low - 1)]
