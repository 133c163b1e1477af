"""The recommendation of a study: which strategy to use, what it saves and what it costs, from measured numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from deqcore.study.report.summary import Interval, SummaryRow, explicit, reference
from deqcore.study.settings import CostSettings

TOLERATED: Final = -0.01  # one point of accuracy below exact gradients, at the lower end of the interval
HARMFUL: Final = 0.9  # cosine below which a reused gradient gives a warning


@dataclass(frozen=True)
class PairedComparison:
    """A row compared with another one, paired by seed.

    Attributes:
        accuracy: difference of test accuracies.
        time: quotient of whole trainings.
        memory: quotient of what training adds to the process.
    """

    accuracy: Interval | None
    time: Interval | None
    memory: Interval | None

    @classmethod
    def of(cls, row: SummaryRow, other: SummaryRow) -> PairedComparison:
        """Compare two rows."""
        return cls(
            row.against(other, "test_accuracy"), row.ratio(other, "training"), row.ratio(other, "training_memory")
        )


@dataclass(frozen=True)
class Bill:
    """The cost of trainings.

    Attributes:
        training: one training, in the currency of the settings. `month`: the retraining schedule.
        saved: per month against exact gradients. `payback`: months until a switch has paid; None if it never does.
    """

    training: float
    month: float
    saved: float | None
    payback: float | None


@dataclass(frozen=True)
class Recommendation:
    """The recommended setting for one kind of problem (data, backend, model).

    Attributes:
        place: data, backend, model.
        best: the row that is recommended; None if nothing trained.
        exact: the row with exact gradients. `explicit`: the network without an equilibrium.
        against_exact, against_explicit: what the recommended row saves and costs.
        bill: cost in money.
        warnings: reasons for doubt, as pairs of a key of `translations.py` and its values.
    """

    place: tuple[str, str, str]
    best: SummaryRow | None
    exact: SummaryRow | None
    explicit: SummaryRow | None
    against_exact: PairedComparison | None
    against_explicit: PairedComparison | None
    bill: Bill | None
    warnings: tuple[tuple[str, dict[str, object]], ...]


def recommendations(rows: Sequence[SummaryRow], cost: CostSettings) -> list[Recommendation]:
    """Return one recommendation for each data set, backend and model with an equilibrium."""
    places = dict.fromkeys(row.place for row in rows if not row.explicit)
    return [_answer([row for row in rows if row.place == place], rows, cost) for place in places]


def acceptable(row: SummaryRow, exact: SummaryRow | None) -> bool:
    """Return whether the lower end of a row's accuracy is at most a point below that of exact gradients."""
    difference = row.against(exact, "test_accuracy") if exact is not None else None
    return difference is None or difference.worst >= TOLERATED


def _answer(group: Sequence[SummaryRow], rows: Sequence[SummaryRow], cost: CostSettings) -> Recommendation:
    trained = [row for row in group if row.results]
    place = group[0].place[:3]
    fit = [row for row in trained if acceptable(row, reference(row, rows))] or trained
    if not fit:
        return Recommendation(place, None, None, None, None, None, None, _warnings(group, None))
    best = min(fit, key=lambda row: (_mean(row, "training"), row.label))
    exact, plain = reference(best, rows), explicit(best, rows)
    return Recommendation(
        place,
        best,
        exact,
        plain,
        PairedComparison.of(best, exact) if exact is not None else None,
        PairedComparison.of(best, plain) if plain is not None else None,
        bill(best, exact, cost),
        _warnings(group, best),
    )


def devices(memory: Interval | None, cost: CostSettings) -> int | None:
    """Return how many devices hold what a row's training adds to memory, where exact gradients need `cost.devices`.

    Memory decides, time does not: fewer devices work longer, and the bill in machine hours stays as it is. Rounded
    up, from the upper end of the interval; None where nothing is saved or only one device is in use.
    """
    if memory is None or cost.devices == 1:
        return None
    needed = math.ceil(cost.devices * (memory.mean if memory.high is None else memory.high))
    return needed if needed < cost.devices else None


def bill(row: SummaryRow, exact: SummaryRow | None, cost: CostSettings) -> Bill:
    """Return what a row's trainings cost at the price of the machine."""

    def training(row: SummaryRow) -> float:
        return _mean(row, "training") * cost.scale / 3600 * cost.price_per_hour

    month = training(row) * cost.trainings_per_month
    saved = None if exact is None else training(exact) * cost.trainings_per_month - month
    payback = cost.switch_cost / saved if saved is not None and saved > 0 else None
    return Bill(training(row), month, saved, payback)


def _warnings(group: Sequence[SummaryRow], best: SummaryRow | None) -> tuple[tuple[str, dict[str, object]], ...]:
    result: list[tuple[str, dict[str, object]]] = []
    if best is not None and len(best.results) < 3:
        result.append(("few_seeds", {"count": len(best.results)}))
    for row in group:
        cosine, gap = row.metric("cosine"), _gap(row, group)
        if cosine is not None and cosine.mean < HARMFUL:
            result.append(("low_cosine", {"strategy": row.label, "solver": row.solver, "cosine": f"{cosine.mean:.2f}"}))
        if gap is not None and gap.high is not None and gap.high < 0 and gap.mean < TOLERATED:
            result.append(("harmful", {"strategy": row.label, "solver": row.solver, "points": f"{100 * gap.mean:.1f}"}))
        unconverged = row.metric("unconverged")
        if unconverged is not None and unconverged.mean > 0.01:
            share = f"{100 * unconverged.mean:.0f}"
            result.append(("unconverged", {"strategy": row.label, "solver": row.solver, "percent": share}))
        result += [
            ("failed", {"strategy": row.label, "solver": row.solver, "seed": seed, "reason": reason})
            for seed, reason in row.failures.items()
        ]
    return tuple(result)


def _gap(row: SummaryRow, among: Sequence[SummaryRow]) -> Interval | None:
    exact = reference(row, among)
    return None if exact is None or exact is row else row.against(exact, "test_accuracy")


def _mean(row: SummaryRow, metric: str) -> float:
    value = row.metric(metric)
    return float("inf") if value is None else value.mean
