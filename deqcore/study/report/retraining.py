"""Long-run accumulation: does what a strategy loses against exact gradients grow from one retraining to the next?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deqcore.study.report.summary import CellResult, Interval, SummaryRow, reference


@dataclass(frozen=True)
class Accumulation:
    """A row over its rounds of retraining.

    Attributes:
        row: of the table.
        accuracy: of the test data, after each round.
        gap: its difference from exact gradients, paired by seed, after each round; None where there are none.
        growth: of the gap from the first round to the last, paired by seed.
    """

    row: SummaryRow
    accuracy: tuple[Interval, ...]
    gap: tuple[Interval, ...] | None
    growth: Interval | None

    @property
    def builds_up(self) -> bool | None:
        """Whether the gap is shown to grow (its whole interval is a loss); None where seeds are too few to say."""
        return None if self.growth is None or self.growth.high is None else self.growth.high < 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        accuracy = [asdict(value) for value in self.accuracy]
        gap = None if self.gap is None else [asdict(value) for value in self.gap]
        growth = None if self.growth is None else asdict(self.growth)
        return {"accuracy": accuracy, "gap": gap, "growth": growth, "builds_up": self.builds_up}


def accumulations(rows: Sequence[SummaryRow]) -> list[Accumulation]:
    """Summarise all rows that were trained more than once."""
    return [_of(row, reference(row, rows)) for row in rows if _count(row) > 1]


def _count(row: SummaryRow) -> int:
    return min((len(_accuracies(result)) for result in row.results.values()), default=0)


def _accuracies(result: CellResult) -> list[float]:
    return [item["test_accuracy"] for item in result.get("rounds", ())]


def _of(row: SummaryRow, exact: SummaryRow | None) -> Accumulation:
    own = {seed: _accuracies(result) for seed, result in row.results.items()}
    accuracy = tuple(Interval.of(column) for column in zip(*own.values(), strict=True))
    if exact is None or exact is row:
        return Accumulation(row, accuracy, None, None)
    theirs = {seed: _accuracies(result) for seed, result in exact.results.items()}
    gaps = [_difference(own[seed], theirs[seed]) for seed in own if seed in theirs]
    if not gaps:
        return Accumulation(row, accuracy, None, None)
    gap = tuple(Interval.of(column) for column in zip(*gaps, strict=True))
    return Accumulation(row, accuracy, gap, Interval.of([item[-1] - item[0] for item in gaps]))


def _difference(own: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(own, theirs, strict=True)]
