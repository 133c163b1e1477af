"""The recommendation of a study: which strategy to use, what it saves and what it costs, from measured numbers only.

A strategy is recommended only if nothing speaks against it: seeds, gradient error, cosine, accuracy, time, failures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from deqcore.study.report.summary import Interval, SummaryRow, at_equal_error, explicit, loosened, reference
from deqcore.study.settings import CostSettings

TOLERATED: Final = -0.01  # one point of accuracy below exact gradients, at the lower end of the interval
LEAST_COSINE: Final = 0.9
LARGEST_ERROR: Final = 0.3  # relative, of the gradient of all weights
LEAST_SEEDS: Final = 3

Reason: TypeAlias = tuple[str, Mapping[str, object]]
"""A key of `translations.py` and its values."""


@dataclass(frozen=True)
class PairedComparison:
    """A row compared with another one, paired by seed.

    Attributes:
        accuracy: difference of test accuracies.
        time: quotient of whole trainings.
        memory: quotient of what the allocator holds for a step.
    """

    accuracy: Interval | None
    time: Interval | None
    memory: Interval | None

    @classmethod
    def of(cls, row: SummaryRow, other: SummaryRow) -> PairedComparison:
        """Compare two rows."""
        return cls(row.against(other, "test_accuracy"), row.ratio(other, "training"), row.ratio(other, "step_memory"))


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
class StrategyLine:
    """The line of one strategy on the first screen.

    Attributes:
        row: of the table.
        versus: against exact gradients; None for the reference itself and where there is none.
        peer: the quickest exact-ift whose gradient error is not larger, and `equal`: the time over its time. None in a
            study without an exact-ift at a looser tolerance.
        reasons: what speaks against a recommendation.
        best: whether it is recommended.
        reference: whether it is the reference of the others.
    """

    row: SummaryRow
    versus: PairedComparison | None
    peer: SummaryRow | None
    equal: Interval | None
    reasons: tuple[Reason, ...]
    best: bool
    reference: bool


@dataclass(frozen=True)
class Recommendation:
    """The recommended setting for one kind of problem (data, backend, model).

    Attributes:
        place: data, backend, model.
        best: the row that is recommended; None if something speaks against each of them.
        exact: the row with exact gradients. `explicit`: the network without an equilibrium.
        against_exact, against_explicit: what the recommended row saves and costs.
        bill: cost in money; None without a price.
        warnings: reasons for doubt, as pairs of a key of `translations.py` and its values.
        lines: one for each strategy.
        seeds: the most seeds that a strategy finished.
    """

    place: tuple[str, str, str]
    best: SummaryRow | None
    exact: SummaryRow | None
    explicit: SummaryRow | None
    against_exact: PairedComparison | None
    against_explicit: PairedComparison | None
    bill: Bill | None
    warnings: tuple[Reason, ...]
    lines: tuple[StrategyLine, ...]
    seeds: int


def recommendations(rows: Sequence[SummaryRow], cost: CostSettings) -> list[Recommendation]:
    """Return one recommendation for each data set, backend and model with an equilibrium."""
    places = dict.fromkeys(row.place for row in rows if not row.explicit)
    return [_answer([row for row in rows if row.place == place], rows, cost) for place in places]


def acceptable(row: SummaryRow, exact: SummaryRow | None) -> bool:
    """Return whether the lower end of a row's accuracy is at most a point below that of exact gradients."""
    difference = row.against(exact, "test_accuracy") if exact is not None else None
    return difference is None or difference.worst >= TOLERATED


def reasons(row: SummaryRow, group: Sequence[SummaryRow]) -> tuple[Reason, ...]:
    """Return what speaks against recommending a row; group: the rows of its place."""
    exact = reference(row, group)
    result: list[Reason] = []
    paired = len(set(row.results) & set(exact.results)) if exact is not None else len(row.results)
    if row.failures:
        result.append(("block_failed", {"count": len(row.failures)}))
    if paired < LEAST_SEEDS:
        result.append(("block_seeds", {"count": paired, "least": LEAST_SEEDS}))
    if exact is row:
        return tuple(result)
    return tuple(result + _quality(row) + _against(row, exact, group))


def _quality(row: SummaryRow) -> list[Reason]:
    """Judge the gradient by its error first: a cosine does not show a wrong length."""
    error, cosine = row.metric("gradient_error"), row.metric("cosine")
    result: list[Reason] = []
    if error is None:
        result.append(("block_unknown", {}))
    elif not error.mean <= LARGEST_ERROR:
        result.append(("block_error", {"limit": f"{LARGEST_ERROR:g}"}))
    if cosine is not None and not cosine.mean >= LEAST_COSINE:
        result.append(("block_cosine", {"limit": f"{LEAST_COSINE:g}"}))
    return result


def _against(row: SummaryRow, exact: SummaryRow | None, group: Sequence[SummaryRow]) -> list[Reason]:
    if exact is None:
        return [("block_no_exact", {})]
    result: list[Reason] = [] if acceptable(row, exact) else [("block_accuracy", {})]
    time, peer = row.ratio(exact, "training"), at_equal_error(row, group)
    if time is None or time.high is None or time.high >= 1:
        result.append(("block_slower", {}))
    equal = row.ratio(peer, "training") if peer is not None else None
    if peer is not None and peer is not exact and equal is not None and equal.mean > 1:
        result.append(("block_beaten", {"strategy": peer.label}))
    return result


def _answer(group: Sequence[SummaryRow], rows: Sequence[SummaryRow], cost: CostSettings) -> Recommendation:
    blocks = {id(row): reasons(row, group) for row in group}
    fit = [row for row in group if row.results and not blocks[id(row)]]
    best = min(fit, key=lambda row: (_mean(row, "training"), row.label), default=None)
    exact = reference(best if best is not None else group[0], group)
    plain = explicit(group[0], rows)
    lines = tuple(_line(row, group, blocks[id(row)], best) for row in group)
    return Recommendation(
        group[0].place[:3],
        best,
        exact,
        plain,
        PairedComparison.of(best, exact) if best is not None and exact is not None else None,
        PairedComparison.of(best, plain) if best is not None and plain is not None else None,
        bill(best, exact, cost) if best is not None else None,
        _warnings(group),
        lines,
        max((len(row.results) for row in group), default=0),
    )


def _line(
    row: SummaryRow, group: Sequence[SummaryRow], against: tuple[Reason, ...], best: SummaryRow | None
) -> StrategyLine:
    exact = reference(row, group)
    peer = at_equal_error(row, group) if any(map(loosened, group)) else None  # exact-ift alone has a smaller error
    versus = PairedComparison.of(row, exact) if exact is not None and exact is not row else None
    equal = row.ratio(peer, "training") if peer is not None else None
    return StrategyLine(row, versus, peer, equal, against, row is best, row is exact)


def devices(memory: Interval | None, cost: CostSettings) -> int | None:
    """Return how many devices hold what a row's training adds to memory, where exact gradients need `cost.devices`.

    Memory decides, time does not: fewer devices work longer, and the bill in machine hours stays as it is. Rounded
    up, from the upper end of the interval; None where nothing is saved or only one device is in use.
    """
    if memory is None or cost.devices == 1:
        return None
    needed = math.ceil(cost.devices * (memory.mean if memory.high is None else memory.high))
    return needed if needed < cost.devices else None


def bill(row: SummaryRow, exact: SummaryRow | None, cost: CostSettings) -> Bill | None:
    """Return what a row's trainings cost at the price of the machine; None without a price."""
    price = cost.price_per_hour
    if price is None:
        return None
    own, theirs = (
        None if measured is None else _mean(measured, "training") * cost.scale / 3600 * price
        for measured in (row, exact)
    )
    assert own is not None
    month = own * cost.trainings_per_month
    saved = None if theirs is None else theirs * cost.trainings_per_month - month
    payback = cost.switch_cost / saved if saved is not None and saved > 0 else None
    return Bill(own, month, saved, payback)


def _warnings(group: Sequence[SummaryRow]) -> tuple[Reason, ...]:
    result: list[Reason] = []
    approximate = [row for row in group if reference(row, group) is not row]
    if approximate and not any(map(loosened, group)):
        result.append(("no_equal", {}))
    if any(row.name == "broyden-reuse" for row in group):
        result.append(("reuse_so_far", {}))
    for row in group:
        who, gap = {"strategy": row.label, "solver": row.solver}, _gap(row, group)
        if gap is not None and gap.high is not None and gap.high < 0 and gap.mean < TOLERATED:
            result.append(("harmful", {**who, "points": f"{100 * gap.mean:.1f}".replace("-", "−")}))
        unconverged = row.metric("unconverged")
        if unconverged is not None and unconverged.mean > 0.01:
            result.append(("unconverged", {**who, "percent": f"{100 * unconverged.mean:.0f}"}))
        result += [("failed", {**who, "seed": seed, "reason": reason}) for seed, reason in row.failures.items()]
    return tuple(result)


def _gap(row: SummaryRow, among: Sequence[SummaryRow]) -> Interval | None:
    exact = reference(row, among)
    return None if exact is None or exact is row else row.against(exact, "test_accuracy")


def _mean(row: SummaryRow, metric: str) -> float:
    value = row.metric(metric)
    return float("inf") if value is None else value.mean
