"""Compare backward strategies on one problem by cost and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from deqcore import api, plugins
from deqcore.abc.backward import StepStrategy
from deqcore.abc.stateful import StatefulStrategy
from deqcore.abc.strategy_state import StrategyState
from deqcore.bench.harness import Harness
from deqcore.bench.machine import peak_memory
from deqcore.bench.strategy_rows import ComparisonRow, StrategyCandidate, StrategyComparison
from deqcore.bench.timing import Spread, interleave
from deqcore.config import Config
from deqcore.diagnostics import adjoint
from deqcore.diagnostics.audit import compare, flat
from deqcore.errors import DeqcoreError
from deqcore.solve.dispatch import plan_call
from deqcore.solve.plan import Plan
from deqcore.solve.verification import coupled_rows
from deqcore.types import Array, Map, SolveResult, Status, Tree

VARIANTS: Final[Mapping[str, Sequence[Mapping[str, object]]]] = MappingProxyType(
    {
        "exact-ift": (
            {},
            {"rtol": 0.01},
            {"rtol": 0.1},
            {"rtol": 0.3},
            {"max_steps": 2},
            {"max_steps": 5},
            {"max_steps": 10},
        ),
        "broyden-reuse": (
            {},
            {"max_relative_error": 0.01},
            {"certify": False, "max_relative_error": None, "fallback": "none"},
        ),
    }
)
"""Options under which a built-in strategy is tried; any other is tried with its defaults.

Approximate strategies are compared with exact-ift that stops early, at several tolerances and steps: at equal error.
"""

REFERENCE_VJPS: Final = 200
SECONDS = 6.0  # of waiting for undisturbed rounds
LONGEST: Final = 1.0  # seconds of a gradient that takes part in the rounds; a slower one is timed once


def candidates() -> Iterator[StrategyCandidate]:
    """Yield every registered strategy, in the options worth trying."""
    for name in plugins.strategies():
        for options in VARIANTS.get(name, ({},)):
            yield StrategyCandidate(name, options)


def compare_strategies(
    harness: Harness,
    f: Callable[..., Tree],
    data: tuple[Tree, Tree, Tree, Tree],
    config: Config,
    choices: Sequence[StrategyCandidate],
    *,
    rounds: int,
    say: Callable[[str], object] = lambda _: None,
) -> StrategyComparison:
    """Measure the choices on z* = f(z*, params, inputs).

    Args:
        harness: of the framework, for timing.
        f: `f(z, params, inputs)`.
        data: parameters, inputs, z0 and cotangent, in arrays of the framework.
        config: settings of the forward solve.
        choices: what is measured.
        rounds: of timing, all choices in turn in each; 0: neither time nor memory is measured. A gradient that takes
            longer than `LONGEST` is timed once.
        say: takes messages on progress.
    """
    at = _Problem(harness, config, f, data, timed=rounds > 0)
    backend, plan = at.backend, at.plan
    say("the exact gradient")
    exact, residual = at.reference()
    coupling = adjoint.coupling(plan, at.vjp, at.forward)
    with backend.errstate():
        pair = coupled_rows(backend, lambda z: backend.detach(at.f(z, *at.args)), at.forward.z)
    rows, tasks = [], {}
    for choice in choices:
        say(choice.label)
        row, task = _measure(at, choice, exact, timed=rounds > 0)
        if task is not None:
            tasks[row.label] = task
        rows.append(row)
    if tasks:
        say("timing")
        seconds = interleave(tasks, rounds=rounds, budget=SECONDS).seconds
        rows = [_timed(row, seconds[row.label]) if row.label in tasks else row for row in rows]
    status = backend.to_numpy(at.forward.status)
    failed = int(np.sum(status != int(Status.CONVERGED)))
    return StrategyComparison(rows, failed, len(status), float(np.max(residual, initial=0.0)), coupling, pair)


class _Problem:
    """One problem, solved once for all candidates.

    Tracing backends compile the solve and the residual once, and a single program for each candidate.

    Attributes:
        plan: of a call with exact-ift; solver and tolerances are those of all candidates.
        f: the problem's function on raveled states.
        start: initial iterate `(batch, n)`.
        args: parameters and inputs.
        g: cotangent `(batch, n)`.
        forward: the solve.
        vjp: `u ↦ Jᵀu` at the solution, outside of compiled code.
    """

    def __init__(
        self,
        harness: Harness,
        config: Config,
        f: Callable[..., Tree],
        data: tuple[Tree, Tree, Tree, Tree],
        *,
        timed: bool,
    ) -> None:
        params, inputs, z0, g = data
        self.jit = harness.jit if timed else harness.jit_once
        self.harness, self.config, self.user_f, self.data = harness, config, f, data
        self.args = (params, inputs)
        self.plan = plan_call(config, _backward(StrategyCandidate("exact-ift")), z0, self.args)
        self.backend = self.plan.backend
        space = self.plan.space
        self.f, self.start, self.g = space.wrap(f), space.ravel(z0), space.ravel_cotangent(g)
        self.solve = self.jit(lambda z0, args: adjoint.solve(self.plan, self.f, z0, args))
        self.forward: SolveResult = self.solve(self.start, self.args)
        self.vjp = adjoint.vjp_at(self.plan, self.f, self.args, self.forward)
        self.residual = harness.jit_once(
            lambda args, g, u, forward: adjoint.residual_of(self.plan, g, u, self._vjp(args, forward))
        )

    def _vjp(self, args: tuple[Any, ...], forward: SolveResult) -> Map:
        return adjoint.vjp_at(self.plan, self.f, args, forward) if self.harness.traced else self.vjp

    def reference(self) -> tuple[adjoint.AdjointSolved, Any]:
        """Return the exact gradient, and its relative residuals `(batch,)`."""
        solved, residual, _ = adjoint.by_reference(
            self.plan, self.f, self.args, self.g, self.forward, self.vjp, REFERENCE_VJPS
        )
        return solved, residual

    def pass_of(self, own: Plan, *, audited: bool = True) -> Callable[[SolveResult], Any]:
        """Return the backward pass of a candidate after a solve: u, gradients and report."""

        def once(z0: Array, args: tuple[Any, ...], g: Array, forward: SolveResult) -> Any:
            vjp = self._vjp(args, forward) if adjoint.starts_at_solution(own.strategy) else None
            return adjoint.apply_strategy(own, self.f, z0, args, g, forward, vjp, audited=audited)

        compiled = self.jit(once)
        return lambda forward: compiled(self.start, self.args, self.g, forward)


def _measure(
    at: _Problem, choice: StrategyCandidate, exact: adjoint.AdjointSolved, *, timed: bool
) -> tuple[ComparisonRow, Callable[[], None] | None]:
    """Return a choice's row, and what to time for it.

    The forward solve and the exact gradient went through before, so whatever is raised here, by the strategy, the
    framework or an f that cannot be used in this way, is a property of the candidate, recorded in its row.
    """
    try:
        own = plan_call(at.config, _backward(choice), at.data[2], at.args)
        backward = at.pass_of(own)
        row = _measure_quality(at, own, choice, backward(at.forward), exact)
        if not timed:
            return row, None
        return _measure_once(at.harness, row, _gradient(at, own, choice, backward))
    except Exception as error:
        return ComparisonRow(choice.label, choice.strategy, dict(choice.options), failure=reason(error)), None


def _measure_once(
    harness: Harness, row: ComparisonRow, task: Callable[[], None]
) -> tuple[ComparisonRow, Callable[[], None] | None]:
    """Return the row with the memory of a gradient, and the task for the rounds; a slow one is timed here instead."""
    took: list[float] = []

    def timed() -> None:
        start = perf_counter()
        task()
        took.append(perf_counter() - start)

    memory = peak_memory(timed)
    if harness.traced or took[0] <= LONGEST:  # the first run has compiled, or allocated what is kept for good
        memory = peak_memory(timed)
    row = replace(row, memory=memory)
    return (_timed(row, took[-1:]), None) if took[-1] > LONGEST else (row, task)


def reason(error: Exception) -> str:
    """Explain in one line why a choice cannot run: deqcore's message, or the type and first line of another error."""
    if isinstance(error, DeqcoreError):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _backward(choice: StrategyCandidate) -> dict[str, Any]:
    return {
        "backward__strategy": choice.strategy,
        "backward__options": dict(choice.options),
        "forward__on_failure": "ignore",
        "backward__on_failure": "ignore",
        "backward__verify_every": 0,
    }


def _timed(row: ComparisonRow, seconds: list[float]) -> ComparisonRow:
    spread = Spread.of(seconds)
    return replace(row, seconds=spread.median, low=spread.low, high=spread.high)


def _gradient(
    at: _Problem, own: Plan, choice: StrategyCandidate, backward: Callable[[SolveResult], Any]
) -> Callable[[], None]:
    """Return one gradient with its solve: as a user computes it, or, where code is compiled, by two programs.

    One compiled program of both would have to compile the solver again for each candidate.
    """
    once = _two_programs(at, own, backward) if at.harness.traced else _as_called(at, choice)

    def run() -> None:
        for leaf in at.backend.flatten(once())[0]:
            if leaf is not None:
                at.harness.block(leaf)

    return run


def _as_called(at: _Problem, choice: StrategyCandidate) -> Callable[[], Any]:
    params, inputs, z0, g = at.data
    settings = _backward(choice)
    if at.backend.capabilities.eager:
        settings["strategy_state"] = StrategyState()
    return lambda: api.vjp(at.user_f, z0, params, inputs, cotangent=g, config=at.config, **settings)


def _two_programs(at: _Problem, own: Plan, backward: Callable[[SolveResult], Any]) -> Callable[[], Any]:
    if isinstance(own.strategy, StatefulStrategy):  # one pass, without the audits before it
        backward = at.pass_of(own, audited=False)
    if not adjoint.starts_at_solution(own.strategy):
        return lambda: backward(at.forward)  # its steps are the solve
    return lambda: backward(at.solve(at.start, at.args))


def _measure_quality(
    at: _Problem, own: Plan, choice: StrategyCandidate, result: Any, exact: adjoint.AdjointSolved
) -> ComparisonRow:
    """Return everything but time and memory, for what the backward pass has returned."""
    backend = at.backend
    own_u, gradients, report = result
    row = ComparisonRow(choice.label, choice.strategy, dict(choice.options))
    u, truth = (backend.to_numpy(item).astype(np.float64) for item in (own_u, exact.u))
    whole = [flat(backend, item)[None] for item in (gradients, exact.gradients)]
    cosine, ratio, error_ = (float(item[0]) for item in compare(*whole))
    row = replace(row, cosine=cosine, norm_ratio=ratio, error=error_, worst_cosine=_least(compare(u, truth)[0]))
    if adjoint.starts_at_solution(own.strategy):
        row = replace(row, residual=_most(backend.to_numpy(at.residual(at.args, at.g, own_u, at.forward))))
    if report is None:
        steps = float(own.strategy.steps) if isinstance(own.strategy, StepStrategy) else np.nan
        return replace(row, vjps=steps, most_vjps=steps)
    figures = {name: backend.to_numpy(leaf) for name, leaf in report._asdict().items()}
    return replace(
        row,
        vjps=float(np.median(figures["vjps"])) if figures["vjps"].size else 0.0,
        most_vjps=float(np.max(figures["vjps"], initial=0)),
        estimate=_most(figures["error"]),
        missed=int(np.sum(figures["status"] != int(Status.CONVERGED))),
    )


def _most(values: Any) -> float:
    available = values[~np.isnan(values)]
    return float(np.max(available)) if available.size else np.nan


def _least(values: Any) -> float:
    return float(np.min(values)) if values.size else np.nan
