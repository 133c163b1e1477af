"""Results over seeds: means with confidence intervals, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np

CellResult: TypeAlias = Mapping[str, Any]
LEVEL: Final = 0.95
EXACT: Final = 1e-3  # the loosest adjoint tolerance at which exact-ift is a reference


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % confidence interval (Student's t).

    Attributes:
        mean: over seeds.
        low, high: ends of the interval; None with fewer than two seeds, which have no spread.
        count: seeds.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Build the interval from one value per seed."""
        mean, count = float(np.mean(values)), len(values)
        if count < 2:
            return cls(mean, None, None, count)
        from scipy.stats import t

        half = float(t.ppf(0.5 + LEVEL / 2, count - 1) * np.std(values, ddof=1) / count**0.5)
        return cls(mean, mean - half, mean + half, count)

    @classmethod
    def of_ratios(cls, values: Sequence[float]) -> Interval:
        """Build the interval from one quotient per seed, on a log scale, so that its ends stay above zero."""
        result = cls.of([math.log(value) for value in values])
        low = None if result.low is None else math.exp(result.low)
        high = None if result.high is None else math.exp(result.high)
        return cls(math.exp(result.mean), low, high, result.count)

    @property
    def worst(self) -> float:
        """The lower end, or the mean where there is no interval."""
        return self.mean if self.low is None else self.low


def gradient_error(result: CellResult) -> float | None:
    """Return ‖g − g*‖ / ‖g*‖ of the gradient of all weights, mean over the audited batches; None without audits."""
    audits = result.get("history", {}).get("audits", ())
    known = [error for error in map(audit_error, audits) if error is not None]
    return sum(known) / len(known) if known else None


def audit_error(audit: Mapping[str, Any]) -> float | None:
    """Return the gradient error of an audit.

    Results of earlier versions have the cosine and the quotient of norms, from which it follows.
    """
    if "error" in audit:
        return float(audit["error"])
    ratio = audit.get("ratio")
    return None if ratio is None else math.sqrt(max(0.0, ratio * ratio - 2 * ratio * audit["cosine"] + 1.0))


def _step_memory(result: CellResult) -> float | None:
    """Return what the allocator of the framework holds for a step. The resident set of a process does not repeat."""
    on_host = result.get("device", "cpu") == "cpu"
    value: float | None = result.get("step_memory", None if on_host else result.get("training_memory"))
    return value


METRICS: Final[dict[str, Callable[[CellResult], float | None]]] = {
    "test_accuracy": lambda result: result["test_accuracy"],
    "test_loss": lambda result: result["test_loss"],
    "forward": lambda result: result["times"]["forward"],
    "backward": lambda result: result["times"]["backward"],
    "update": lambda result: result["times"]["update"],
    "step": lambda result: result["times"]["step"],
    "training": lambda result: result["times"]["training"],
    "warm_up": lambda result: result["warm_up"],
    "seconds": lambda result: result.get("seconds"),
    "step_memory": _step_memory,
    "peak_memory": lambda result: result["peak_memory"],
    "training_memory": lambda result: result["training_memory"],
    "evaluations": lambda result: result["figures"]["evaluations_most"],
    "vjps": lambda result: result["figures"]["vjps_most"],
    "unconverged": lambda result: result["figures"]["unconverged"],
    "adjoint_residual": lambda result: result["figures"]["adjoint_residual"],
    "fallback": lambda result: result["figures"]["fallback"],
    "cosine": lambda result: result["cosine"],
    "gradient_error": gradient_error,
    "radius": lambda result: _last(result, "radius"),
    "radius_most": lambda result: _last(result, "radius_most"),
}


@dataclass(frozen=True)
class SummaryRow:
    """Cells that differ in their seed only.

    Attributes:
        place: data, backend, model and width: what has one exact gradient and one explicit network to compare with.
        solver, strategy, rtol: how it was trained. `name`: the strategy's registered name. `options`: the strategy's.
        results: of the cells that ended well, by seed.
        failures: reasons of those that did not, by seed.
    """

    place: tuple[str, str, str, int]
    solver: str
    strategy: str
    name: str
    rtol: float
    results: Mapping[int, CellResult]
    failures: Mapping[int, str]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def explicit(self) -> bool:
        """Whether it has no equilibrium."""
        return self.name == "explicit"

    @property
    def label(self) -> str:
        """The strategy, or the model where there is none."""
        return self.place[2] if self.explicit else self.strategy

    def metric(self, name: str) -> Interval | None:
        """Return a metric over seeds; None where it was not measured."""
        values = [METRICS[name](result) for result in self.results.values()]
        available = [value for value in values if value is not None]
        return Interval.of(available) if available else None

    def against(self, other: SummaryRow, name: str) -> Interval | None:
        """Return the difference of a metric, paired by seed."""
        result = [own - theirs for own, theirs in self._pairs(other, name)]
        return Interval.of(result) if result else None

    def ratio(self, other: SummaryRow, name: str) -> Interval | None:
        """Return the quotient of a metric, paired by seed; of positive numbers only."""
        result = [own / theirs for own, theirs in self._pairs(other, name) if own > 0 and theirs > 0]
        return Interval.of_ratios(result) if result else None

    def _pairs(self, other: SummaryRow, name: str) -> list[tuple[float, float]]:
        read = METRICS[name]
        both = [seed for seed in self.results if seed in other.results]
        pairs = [(read(self.results[seed]), read(other.results[seed])) for seed in both]
        return [(own, theirs) for own, theirs in pairs if own is not None and theirs is not None]


def rows(results: Iterable[CellResult]) -> list[SummaryRow]:
    """Group results by everything but the seed, in their order."""
    grouped: dict[tuple[Any, ...], list[CellResult]] = {}
    for result in results:
        cell = result["cell"]
        place = (cell["data"]["label"], cell["backend"], cell["model"]["name"], cell["model"]["width"])
        key = (place, _named(cell["solver"]), cell["strategy"]["label"], cell["strategy"]["name"], cell["rtol"])
        grouped.setdefault(key, []).append(result)
    return [_row(key, value) for key, value in grouped.items()]


def _row(key: tuple[Any, ...], results: Sequence[CellResult]) -> SummaryRow:
    place, solver, strategy, name, rtol = key
    good = {item["cell"]["seed"]: item for item in results if item["status"] == "ok"}
    bad = {item["cell"]["seed"]: f"{item['reason']}: {item['detail']}" for item in results if item["status"] != "ok"}
    options = results[0]["cell"]["strategy"].get("options", {})
    return SummaryRow(place, solver, strategy, name, rtol, good, bad, options)


def reference(row: SummaryRow, among: Iterable[SummaryRow]) -> SummaryRow | None:
    """Return the row that was trained with exact gradients and is otherwise the same.

    Of several rows with exact-ift it is the tightest; one that stops early (`loosened`) is not exact.
    """
    same = (other for other in among if other.place == row.place and other.rtol == row.rtol and other.results)
    exact = [other for other in same if other.name == "exact-ift" and not loosened(other)]
    return min(exact, key=lambda other: (other.solver != row.solver, _tolerance(other)), default=None)


def loosened(row: SummaryRow) -> bool:
    """Return whether a row is exact-ift that stops before its gradient is exact: at a tolerance, an error or a step."""
    stops = (row.options.get(name) not in (None, "none", "auto") for name in ("max_relative_error", "max_steps"))
    return row.name == "exact-ift" and (any(stops) or _tolerance(row) > EXACT)


def at_equal_error(row: SummaryRow, among: Iterable[SummaryRow]) -> SummaryRow | None:
    """Return the quickest other row with exact-ift whose gradient error is not larger; None if nothing was measured."""
    error = row.metric("gradient_error")
    if error is None:
        return None
    fitting = []
    for other in among:
        theirs, time = other.metric("gradient_error"), other.metric("training")
        same = other.place == row.place and other.rtol == row.rtol and other.solver == row.solver
        if same and other is not row and other.name == "exact-ift" and theirs is not None and time is not None:
            fitting += [(time.mean, other)] if theirs.mean <= error.mean else []
    return min(fitting, key=lambda item: item[0], default=(0.0, None))[1]


def _tolerance(row: SummaryRow) -> float:
    value = row.options.get("rtol", "auto")
    return 0.0 if isinstance(value, str) or value is None else float(value)


def explicit(row: SummaryRow, among: Iterable[SummaryRow]) -> SummaryRow | None:
    """Return the explicit network of equal size."""
    data, backend, model, width = row.place
    place = (data, backend, f"{model}-explicit", width)
    return next((other for other in among if other.place == place and other.results), None)


def _named(solver: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name}={value}" for name, value in solver["options"].items())
    return f"{solver['name']} ({options})" if options else str(solver["name"])


def _last(result: CellResult, name: str) -> float | None:
    audits = result["history"]["audits"]
    value: float | None = audits[-1][name] if audits else None
    return value
