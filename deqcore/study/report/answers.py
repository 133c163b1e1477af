"""The first screen of a report, as text: what is recommended, a line for each strategy, and reasons for doubt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rich.console import Group
from rich.text import Text

from deqcore.study.labels import called
from deqcore.study.report import table
from deqcore.study.report.plots import name
from deqcore.study.report.recommendation import (
    LEAST_SEEDS,
    Recommendation,
    StrategyLine,
    devices,
    recommendations,
)
from deqcore.study.report.summary import Interval, SummaryRow
from deqcore.study.report.terminal import fitted
from deqcore.study.settings import CostSettings, Study
from deqcore.study.translations import say

HEADS: Final = ("strategy", "verdict", "error", "cosine", "accuracy", "time", "equal", "memory")


def answers(rows: Sequence[SummaryRow], study: Study) -> list[dict[str, Any]]:
    """Return, for each kind of problem: `head`, `best` (whether there is one), `sentences`, `lines`, `warnings`."""
    return [_answer(answer, rows, study) for answer in recommendations(rows, study.cost)]


def heads(language: str) -> list[str]:
    """Return the heads of the lines."""
    return [say(language, f"line_{word}") for word in HEADS]


def terminal(rows: Sequence[SummaryRow], study: Study, width: int) -> Group:
    """Return the first screen for a terminal of this width."""
    parts: list[Text | Group] = []
    for answer in answers(rows, study):
        parts += [Text(answer["head"], style="bold" if answer["best"] else ""), *map(Text, answer["sentences"])]
        lines = [[text for text, _ in line] for line in answer["lines"]]
        parts += [
            fitted(heads(study.language), lines, 1, width),
            *(Text(f"• {warning}", style="yellow") for warning in answer["warnings"]),
        ]
    return Group(*parts)


def _answer(answer: Recommendation, rows: Sequence[SummaryRow], study: Study) -> dict[str, Any]:
    language = study.language
    data, backend, model = answer.place
    place = {"data": data, "backend": backend, "model": model}
    warnings = [say(language, word, **_named(language, values)) for word, values in answer.warnings]
    lines = [_line(line, rows, language) for line in answer.lines]
    common: dict[str, Any] = {"warnings": warnings, "lines": lines, "best": answer.best is not None}
    best = answer.best
    if best is not None:
        head = say(language, "use", strategy=best.label, solver=best.solver, **place)
        return {**common, "head": head, "sentences": _sentences(answer, best, study)}
    if answer.seeds == 0:
        return {**common, "head": say(language, "nothing", **place), "sentences": []}
    word = "few" if answer.seeds < LEAST_SEEDS else "none_fits"
    values = {"count": answer.seeds, "least": LEAST_SEEDS} if word == "few" else {}
    return {**common, "head": say(language, word, **place, **values), "sentences": []}


def _named(language: str, values: Any) -> dict[str, object]:
    """Return the values of a sentence; the reason of a failure begins with a key that has a translation."""
    reason, separator, detail = str(values.get("reason", "")).partition(": ")
    return {**values, **({"reason": called(language, reason) + separator + detail} if reason else {})}


def _sentences(answer: Recommendation, best: SummaryRow, study: Study) -> list[str]:
    language = study.language
    result = [say(language, "accuracy", accuracy=table.percent(best.metric("test_accuracy")))]
    if best is answer.exact:
        result.append(say(language, "is_exact"))
    elif answer.against_exact is not None:
        versus = answer.against_exact
        ratio, points = bracketed(versus.time, 1.0, 2), bracketed(versus.accuracy, 100.0, 2, signed=True)
        result.append(say(language, "time_exact", ratio=ratio, points=points))
        if versus.memory is not None:
            result.append(say(language, "memory", ratio=bracketed(versus.memory, 1.0, 2)))
        fewer = devices(versus.memory, study.cost)
        if fewer is not None:
            result.append(say(language, "devices", devices=study.cost.devices, fewer=fewer))
    if answer.against_explicit is not None:
        versus = answer.against_explicit
        ratio, points = bracketed(versus.time, 1.0, 2), bracketed(versus.accuracy, 100.0, 2, signed=True)
        result.append(say(language, "time_explicit", ratio=ratio, points=points))
    return result + _money(answer, study.cost, language)


def _line(line: StrategyLine, rows: Sequence[SummaryRow], language: str) -> list[tuple[str, float | None]]:
    """Return the cells of a strategy's line: text, and the number by which it is sorted."""
    row, versus = line.row, line.versus
    own = (row.metric("gradient_error"), row.metric("cosine")) if row.results else (None, None)
    paired = (None, None, None) if versus is None else (versus.accuracy, versus.time, versus.memory)
    peer = "" if line.peer is None or line.equal is None else f" ({line.peer.label})"
    return [
        (name(row, rows), None),
        (_verdict(line, language), None),
        (table.error(own[0]), _mean(own[0])),
        (table.cosine(own[1]), _mean(own[1])),
        (bracketed(paired[0], 100.0, 2, signed=True), _mean(paired[0])),
        (bracketed(paired[1], 1.0, 2), _mean(paired[1])),
        (bracketed(line.equal, 1.0, 2) + peer, _mean(line.equal)),
        (bracketed(paired[2], 1.0, 2), _mean(paired[2])),
    ]


def _verdict(line: StrategyLine, language: str) -> str:
    against = [say(language, word, **values) for word, values in line.reasons]
    if line.best:
        against = [say(language, "is_best")]
    elif not line.reference and not against:
        against = [say(language, "is_fit")]
    return ("、" if language == "ja" else "; ").join(
        [*([say(language, "is_reference")] if line.reference else []), *against]
    )


def _money(answer: Recommendation, cost: CostSettings, language: str) -> list[str]:
    bill = answer.bill
    if bill is None:
        return []

    def amount(value: float) -> str:
        return money(value, cost.currency, language)

    training, month = amount(bill.training), amount(bill.month)
    sentences = [say(language, "money", training=training, month=month, count=f"{cost.trainings_per_month:g}")]
    if bill.saved is not None and answer.best is not answer.exact:
        sentences.append(say(language, "saved" if bill.saved >= 0 else "lost", saved=amount(abs(bill.saved))))
    if bill.payback is not None and cost.switch_cost > 0:
        sentences.append(say(language, "payback", switch=amount(cost.switch_cost), months=f"{bill.payback:.1f}"))
    return sentences


def money(value: float, currency: str, language: str) -> str:
    """Return an amount as its language writes it: 1,234 円, 12.30 USD. Small amounts keep three digits."""
    digits = 0 if currency == "JPY" else 2
    text = table.significant(value) if 0 < value < 10 ** (2 - digits) else f"{value:,.{digits}f}"
    return f"{text} {called(language, currency)}"


def bracketed(value: Interval | None, scale: float, digits: int, *, signed: bool = False) -> str:
    """Return a mean and, in brackets, its interval."""
    if value is None:
        return "–"
    sign = "+" if signed else ""

    def number(part: float) -> str:
        rounded = round(scale * part, digits) + 0.0  # without the sign of a negative zero
        return f"{rounded:{sign}.{digits}f}".replace("-", "−")

    if value.low is None or value.high is None:
        return number(value.mean)
    return f"{number(value.mean)} [{number(value.low)}, {number(value.high)}]"


def _mean(value: Interval | None) -> float | None:
    return None if value is None else value.mean
