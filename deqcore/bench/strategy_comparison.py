"""Compare backward strategies on one problem by cost and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from deqcore import api, plugins
from deqcore.abc.backend import Backend
from deqcore.abc.backward import StepStrategy
from deqcore.abc.stateful import StrategyState
from deqcore.bench.harness import Harness
from deqcore.bench.machine import peak_memory
from deqcore.bench.pareto import front
from deqcore.bench.timing import Spread, interleave
from deqcore.config import Config
from deqcore.diagnostics import adjoint
from deqcore.diagnostics.audit import compare, flat
from deqcore.errors import DeqcoreError
from deqcore.solve.dispatch import plan_call
from deqcore.solve.plan import Plan
from deqcore.solve.verification import coupled_rows
from deqcore.types import Array, Status, Tree

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


@dataclass(frozen=True)
class StrategyCandidate:
    """A strategy with options."""

    strategy: str
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For tables."""
        if not self.options:
            return self.strategy
        if self.options.get("certify") is False:
            return f"{self.strategy} (plain)"
        return f"{self.strategy} ({', '.join(f'{name}={value}' for name, value in self.options.items())})"


@dataclass(frozen=True)
class ComparisonRow:
    """Cost and accuracy of one candidate. NaN: unknown or not measured.

    Attributes:
        label: strategy and options.
        vjps: vector–Jacobian products, median over the samples; the steps of a strategy that differentiates steps.
        most_vjps: the largest number of products.
        residual: adjoint residual ‖g + Jᵀu − u‖ / ‖g‖, measured and not as reported, the largest.
        estimate: error that the strategy itself reports, the largest.
        missed: samples that it reports as not having met its target.
        cosine: of the gradient of all parameters and inputs with the exact one.
        norm_ratio: quotient of the norms of the two.
        error: relative difference between the two.
        worst_cosine: of u, over the samples.
        seconds: median for one gradient, solve included.
        low: lower quartile of the seconds.
        high: upper quartile.
        memory: bytes by which the process grew; None if the system does not report it.
        failure: the reason for missing figures, or "".
    """

    label: str
    strategy: str
    options: Mapping[str, object]
    vjps: float = np.nan
    most_vjps: float = np.nan
    residual: float = np.nan
    estimate: float = np.nan
    missed: int = 0
    cosine: float = np.nan
    norm_ratio: float = np.nan
    error: float = np.nan
    worst_cosine: float = np.nan
    seconds: float = np.nan
    low: float = np.nan
    high: float = np.nan
    memory: int | None = None
    failure: str = ""

    def as_dict(self) -> dict[str, object]:
        """Return plain values; what is not known is None."""
        result = asdict(self)
        return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in result.items()}


@dataclass(frozen=True)
class StrategyComparison:
    """All candidates on one problem.

    Attributes:
        rows: one per choice.
        failed: samples whose solve did not meet its tolerance.
        samples: in the batch.
        trust: adjoint residual of the reference, the largest.
        coupling: how much of a vector–Jacobian product lands in samples where its cotangent is zero, the largest.
        pair: (i, j) if sample i of f(z) was seen to change when sample j of z does.
    """

    rows: Sequence[ComparisonRow]
    failed: int
    samples: int
    trust: float
    coupling: float = 0.0
    pair: tuple[int, int] | None = None


def candidates() -> Iterator[StrategyCandidate]:
    """Yield every registered strategy, in the options worth trying."""
    for name in plugins.strategies():
        for options in VARIANTS.get(name, ({},)):
            yield StrategyCandidate(name, options)


def compare_strategies(
    harness: Harness,
    backend: Backend,
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
        backend: the same.
        f: `f(z, params, inputs)`.
        data: parameters, inputs, z0 and cotangent, in arrays of the framework.
        config: settings of the forward solve.
        choices: what is measured.
        rounds: of timing, all choices in turn in each; 0: neither time nor memory is measured.
        say: takes messages on progress.
    """
    params, inputs, z0, g = data
    plan = plan_call(config, _backward(StrategyCandidate("exact-ift")), z0, (params, inputs))
    space = plan.space
    raveled, start, cotangent = space.wrap(f), space.ravel(z0), space.ravel_cotangent(g)
    args = (params, inputs)
    say("the exact gradient")
    forward = adjoint.solve(plan, raveled, start, args)
    vjp = adjoint.vjp_at(plan, raveled, args, forward)
    exact, residual, _ = adjoint.by_reference(plan, raveled, args, cotangent, forward, vjp, REFERENCE_VJPS)
    status = backend.to_numpy(forward.status)
    coupling = adjoint.coupling(plan, vjp, forward)
    with backend.errstate():
        pair = coupled_rows(backend, lambda z: backend.detach(raveled(z, *args)), forward.z)
    rows, tasks = [], {}
    for choice in choices:
        say(choice.label)
        row, task = _measure(harness, plan, config, choice, f, (raveled, start, args, cotangent), data, exact, rounds)
        if task is not None:
            tasks[row.label] = task
        rows.append(row)
    if tasks:
        say("timing")
        seconds = interleave(tasks, rounds=rounds, budget=SECONDS).seconds
        rows = [_timed(row, seconds[row.label]) if row.label in tasks else row for row in rows]
    failed = int(np.sum(status != int(Status.CONVERGED)))
    return StrategyComparison(rows, failed, len(status), float(np.max(residual, initial=0.0)), coupling, pair)


def _measure(
    harness: Harness,
    plan: Plan,
    config: Config,
    choice: StrategyCandidate,
    f: Callable[..., Tree],
    raveled: tuple[Callable[..., Array], Array, tuple[Any, ...], Array],
    data: tuple[Tree, Tree, Tree, Tree],
    exact: adjoint.AdjointSolved,
    rounds: int,
) -> tuple[ComparisonRow, Callable[[], None] | None]:
    """Return a choice's row, and what to time for it.

    The forward solve and the exact gradient went through before, so whatever is raised here, by the strategy, the
    framework or an f that cannot be used in this way, is a property of the candidate, recorded in its row.
    """
    try:
        row = _measure_quality(harness, plan, config, choice, raveled, exact)
        if not rounds:
            return row, None
        task = _gradient(harness, config, choice, f, data)
        task()
        return replace(row, memory=peak_memory(task)), task
    except Exception as error:
        return ComparisonRow(choice.label, choice.strategy, dict(choice.options), failure=reason(error)), None


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
    harness: Harness,
    config: Config,
    choice: StrategyCandidate,
    f: Callable[..., Tree],
    data: tuple[Tree, Tree, Tree, Tree],
) -> Callable[[], None]:
    """Return one gradient as a user computes it, compiled where the framework compiles."""
    params, inputs, z0, g = data
    settings = _backward(choice)
    if api.get_backend(config).capabilities.eager:
        settings["strategy_state"] = StrategyState()

    def once(z0: Tree, params: Tree, inputs: Tree, g: Tree) -> Any:
        z, gradients = api.vjp(f, z0, params, inputs, cotangent=g, config=config, **settings)
        return z, gradients

    compiled = harness.jit(once)
    flatten = api.get_backend(config).flatten

    def run() -> None:
        for leaf in flatten(compiled(z0, params, inputs, g))[0]:
            if leaf is not None:
                harness.block(leaf)

    return run


def _measure_quality(
    harness: Harness,
    plan: Plan,
    config: Config,
    choice: StrategyCandidate,
    problem: tuple[Callable[..., Array], Array, tuple[Any, ...], Array],
    exact: adjoint.AdjointSolved,
) -> ComparisonRow:
    """Return everything but time and memory."""
    f, z0, args, g = problem
    backend = plan.backend
    row = ComparisonRow(choice.label, choice.strategy, dict(choice.options))
    own = plan_call(config, _backward(choice), plan.space.unravel(z0), args)

    def once(z0: Array, args: tuple[Any, ...], g: Array) -> adjoint.AdjointSolved:
        return adjoint.by_strategy(own, f, z0, args, g, adjoint.solve(own, f, z0, args))

    result = adjoint.AdjointSolved(*harness.jit(lambda *data: tuple(vars(once(*data)).values()))(z0, args, g))
    u, truth = (backend.to_numpy(item.u).astype(np.float64) for item in (result, exact))
    whole = [flat(backend, item.gradients)[None] for item in (result, exact)]
    cosine, ratio, error_ = (float(item[0]) for item in compare(*whole))
    row = replace(row, cosine=cosine, norm_ratio=ratio, error=error_, worst_cosine=_least(compare(u, truth)[0]))
    row = replace(row, residual=_most(backend.to_numpy(result.residual)))
    if result.report is None:
        steps = float(own.strategy.steps) if isinstance(own.strategy, StepStrategy) else np.nan
        return replace(row, vjps=steps, most_vjps=steps)
    report = {name: backend.to_numpy(leaf) for name, leaf in result.report._asdict().items()}
    return replace(
        row,
        vjps=float(np.median(report["vjps"])) if report["vjps"].size else 0.0,
        most_vjps=float(np.max(report["vjps"], initial=0)),
        estimate=_most(report["error"]),
        missed=int(np.sum(report["status"] != int(Status.CONVERGED))),
    )


def _most(values: Any) -> float:
    available = values[~np.isnan(values)]
    return float(np.max(available)) if available.size else np.nan


def _least(values: Any) -> float:
    return float(np.min(values)) if values.size else np.nan


def cheapest(rows: Sequence[ComparisonRow], good: Callable[[ComparisonRow], bool]) -> ComparisonRow | None:
    """Return the quickest row that is good enough; by vjps where nothing was timed."""
    fitting = [row for row in rows if not row.failure and good(row)]
    return min(fitting, key=lambda row: (np.nan_to_num(row.seconds), row.vjps), default=None)


def on_front(rows: Sequence[ComparisonRow]) -> set[str]:
    """Return the labels of the rows that no other beats in both error and time (vjps where nothing was timed)."""
    usable = [row for row in rows if not row.failure]
    timed = any(not np.isnan(row.seconds) for row in usable)
    points = [(row.seconds if timed else row.vjps, row.error) for row in usable]
    return {usable[index].label for index in front(points)}
