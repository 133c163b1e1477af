"""Staged gates: criteria for a strategy to go from pilot to shadow to rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from deqcore.errors import ConfigError
from deqcore.study.labels import called
from deqcore.study.report.summary import SummaryRow, reference
from deqcore.study.settings import Gate
from deqcore.study.translations import say


def _points(row: SummaryRow, exact: SummaryRow | None) -> float | None:
    result = None if exact is None else row.against(exact, "test_accuracy")
    return None if result is None else 100 * result.worst


def _quotient(metric: str) -> Callable[[SummaryRow, SummaryRow | None], float | None]:
    def read(row: SummaryRow, exact: SummaryRow | None) -> float | None:
        result = None if exact is None else row.ratio(exact, metric)
        return None if result is None else result.mean if result.high is None else result.high

    return read


def _metric(metric: str, scale: float = 1.0) -> Callable[[SummaryRow, SummaryRow | None], float | None]:
    def read(row: SummaryRow, _: SummaryRow | None) -> float | None:
        result = row.metric(metric)
        return None if result is None else scale * result.mean

    return read


METRICS: Final[dict[str, Callable[[SummaryRow, SummaryRow | None], float | None]]] = {
    "accuracy": _metric("test_accuracy", 100.0),  # percent
    "accuracy_difference": _points,  # points against exact-ift, lower end of the 95 % interval
    "time_ratio": _quotient("training"),  # whole training against exact-ift, upper end of the 95 % interval
    "memory_ratio": _quotient("step_memory"),
    "gradient_error": _metric("gradient_error"),
    "cosine": _metric("cosine"),
    "unconverged": _metric("unconverged"),
    "fallback": _metric("fallback"),
    "failures": lambda row, _: float(len(row.failures)),
    "seeds": lambda row, _: float(len(row.results)),
}


@dataclass(frozen=True)
class Judged:
    """A gate and what was measured.

    Attributes:
        stage: of the gate.
        criterion: as text.
        measured: the worst value over all data, backends, models and solvers.
        passed: whether it holds; what was not measured does not.
    """

    stage: str
    criterion: str
    measured: str
    passed: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


@dataclass(frozen=True)
class GateVerdict:
    """All gates of a study, in their order."""

    gates: tuple[Judged, ...]

    @property
    def go(self) -> bool:
        """Whether every gate is passed."""
        return all(gate.passed for gate in self.gates)

    def sentence(self, language: str) -> str:
        """Go or no-go, and why."""
        if self.go:
            return say(language, "go_all")
        first = next(gate for gate in self.gates if not gate.passed)
        stages = list(dict.fromkeys(gate.stage for gate in self.gates))
        passed = stages[: stages.index(first.stage)]
        why = f"{first.criterion} ({first.measured})"
        if not passed:
            return say(language, "no_go_first", stage=first.stage, why=why)
        return say(language, "go_until", passed=", ".join(passed), stage=first.stage, why=why)


def check(gates: Sequence[Gate], labels: Sequence[str]) -> None:
    """Check the gates before training.

    Raises:
        ConfigError: a gate names a metric or a strategy that is not in the study.
    """
    for gate in gates:
        if gate.metric not in METRICS:
            raise ConfigError.no_entry("[[study.gates]]", "metric", gate.metric, METRICS)
        if gate.strategy not in labels:
            raise ConfigError.no_entry("[[study.gates]]", "strategy of the study", gate.strategy, labels)


def judge(rows: Sequence[SummaryRow], gates: Sequence[Gate], language: str = "en") -> GateVerdict:
    """Compare each gate with the worst row of its strategy; `language` is that of its texts."""
    return GateVerdict(tuple(_judge_gate(gate, rows, language) for gate in gates))


def _judge_gate(gate: Gate, rows: Sequence[SummaryRow], language: str) -> Judged:
    candidates = [row for row in rows if row.strategy == gate.strategy]
    values = [METRICS[gate.metric](row, reference(row, rows)) for row in candidates]
    measured = [value for value in values if value is not None]
    least, most = gate.at_least, gate.at_most
    stage, criterion = called(language, gate.stage), f"{gate.strategy}: {called(language, gate.metric)}"
    criterion += "" if least is None else f" ≥ {least:g}"
    criterion += "" if most is None else f" ≤ {most:g}"
    if not measured or len(measured) < len(values):
        return Judged(stage, criterion, "–", passed=False)
    worst = max(measured) if least is None else min(measured)
    passed = (least is None or min(measured) >= least) and (most is None or max(measured) <= most)
    return Judged(stage, criterion, f"{worst:.4g}", passed)
