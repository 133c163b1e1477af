"""What a comparison of backward strategies finds: candidates, rows, and the rows that stand out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from deqcore.bench.pareto import front


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
