"""What a study leaves behind: results.json, results.csv, results.md and one page of HTML that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from deqcore.study import store
from deqcore.study.report import table
from deqcore.study.report.gates import GateVerdict, judge
from deqcore.study.report.plots import name, plots
from deqcore.study.report.recommendation import Recommendation, devices, recommendations
from deqcore.study.report.retraining import Accumulation, accumulations
from deqcore.study.report.summary import METRICS, Interval, SummaryRow, rows
from deqcore.study.settings import CostSettings, Study
from deqcore.study.translations import LANGUAGES, head, say


def write(root: Path, study: Study, results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> list[SummaryRow]:
    """Write all files of the report.

    Args:
        root: the directory of the study.
        study: its settings.
        results: of its cells.
        about: machine, versions, and the command that reproduces it.

    Returns:
        The rows of the table.
    """
    value = rows(results)
    devices = sorted({result["device"] for result in results if "device" in result})
    about = {**about, "machine": {**about["machine"], **({"device": ", ".join(devices)} if devices else {})}}
    verdict = judge(value, study.gates)
    summary = [_summary(row, value) for row in value]
    judged = [gate.as_dict() for gate in verdict.gates]
    content = {**about, "settings": study.model_dump(), "summary": summary, "gates": judged, "cells": list(results)}
    store.write_json(root / "results.json", content)
    store.write(root / "results.csv", table.comma_separated(value).encode())
    store.write(root / "results.md", table.markdown(value).encode())
    store.write(root / "report.html", page(study, value, verdict, about).encode())
    return value


def page(study: Study, rows: Sequence[SummaryRow], verdict: GateVerdict, about: Mapping[str, Any]) -> str:
    """Return the HTML. Every name in it is escaped: a class or a data set may be called anything."""
    from jinja2 import Environment, StrictUndefined

    source = resources.files("deqcore.study.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False).from_string(source)
    header, lines = table.cells(rows)
    words = LANGUAGES[study.language]
    return template.render(
        language=study.language,
        words=words,
        title=say(study.language, "title", name=study.name),
        recommendations=[_told(answer, study) for answer in recommendations(rows, study.cost)],
        gates=[gate.as_dict() for gate in verdict.gates],
        verdict={"go": verdict.go, "text": verdict.sentence(study.language)},
        shared=table.shared(rows, lambda title: head(study.language, title)),
        header=[head(study.language, title) for title in header],
        lines=lines,
        labels=len(header) - len(table.COLUMNS),
        rounds=[_round(accumulation, rows, study.language) for accumulation in accumulations(rows)],
        plots=[{"title": words[word], "svg": svg} for word, svg in plots(rows).items()],
        command=about["command"],
        machine=_flat(about["machine"]),
        settings=json.dumps(study.model_dump(), indent=1, ensure_ascii=False),
    )


def _told(answer: Recommendation, study: Study) -> dict[str, object]:
    """Return the first screen: one sentence that answers, then what it rests on."""
    language = study.language
    data, backend, model = answer.place
    place = {"data": data, "backend": backend, "model": model}
    warnings = [say(language, word, **values) for word, values in answer.warnings]
    best = answer.best
    if best is None:
        return {"head": say(language, "nothing", **place), "sentences": [], "warnings": warnings}
    unsure = "few_seeds" in [word for word, _ in answer.warnings]
    head = say(language, "use_unsure" if unsure else "use", strategy=best.label, solver=best.solver, **place)
    sentences = [say(language, "accuracy", accuracy=table.percent(best.metric("test_accuracy")))]
    if best is answer.exact:
        sentences.append(say(language, "is_exact"))
    elif answer.against_exact is not None:
        versus = answer.against_exact
        ratio, points = _bracketed(versus.time, 1.0, 2), _bracketed(versus.accuracy, 100.0, 2, signed=True)
        sentences.append(say(language, "time_exact", ratio=ratio, points=points))
        if versus.memory is not None:
            batch = f"{1 / versus.memory.mean:.2f}"
            sentences.append(say(language, "memory", ratio=_bracketed(versus.memory, 1.0, 2), batch=batch))
        fewer = devices(versus.memory, study.cost)
        if fewer is not None:
            sentences.append(say(language, "devices", devices=study.cost.devices, fewer=fewer))
    if answer.against_explicit is not None:
        versus = answer.against_explicit
        ratio, points = _bracketed(versus.time, 1.0, 2), _bracketed(versus.accuracy, 100.0, 2, signed=True)
        sentences.append(say(language, "time_explicit", ratio=ratio, points=points))
    return {"head": head, "sentences": sentences + _money(answer, study.cost, language), "warnings": warnings}


def _round(accumulation: Accumulation, rows: Sequence[SummaryRow], language: str) -> dict[str, Any]:
    """Return a line of the table of rounds and its verdict."""
    row = accumulation.row
    gaps = accumulation.gap or (None,) * len(accumulation.accuracy)
    values = [table.percent(value) + _gap(gap) for value, gap in zip(accumulation.accuracy, gaps, strict=True)]
    heads = [say(language, "round", number=number) for number in range(1, len(values) + 1)]
    word = "builds_up" if accumulation.builds_up else "no_build_up"
    verdict = "" if accumulation.builds_up is None else say(language, word, strategy=row.label, solver=row.solver)
    growth = _bracketed(accumulation.growth, 100.0, 2, signed=True)
    return {"label": name(row, rows), "heads": heads, "values": [*values, growth], "verdict": verdict}


def _gap(value: Interval | None) -> str:
    return "" if value is None else f" ({100 * value.mean:+.2f})".replace("-", "−")


def _money(answer: Recommendation, cost: CostSettings, language: str) -> list[str]:
    bill = answer.bill
    if bill is None:
        return []

    def amount(value: float) -> str:
        return f"{table.significant(value)} {cost.currency}"

    training, month = amount(bill.training), amount(bill.month)
    sentences = [say(language, "money", training=training, month=month, count=f"{cost.trainings_per_month:g}")]
    if bill.saved is not None and answer.best is not answer.exact:
        sentences.append(say(language, "saved" if bill.saved >= 0 else "lost", saved=amount(abs(bill.saved))))
    if bill.payback is not None and cost.switch_cost > 0:
        sentences.append(say(language, "payback", switch=amount(cost.switch_cost), months=f"{bill.payback:.1f}"))
    return sentences


def _bracketed(value: Interval | None, scale: float, digits: int, *, signed: bool = False) -> str:
    if value is None:
        return "–"
    sign = "+" if signed else ""
    text = f"{scale * value.mean:{sign}.{digits}f}".replace("-", "−")
    if value.low is None or value.high is None:
        return text
    ends = f"[{scale * value.low:{sign}.{digits}f}, {scale * value.high:{sign}.{digits}f}]"
    return f"{text} {ends.replace('-', '−')}"


def _summary(row: SummaryRow, among: Sequence[SummaryRow]) -> dict[str, Any]:
    metrics = {name: row.metric(name) for name in METRICS} if row.results else {}
    numbers = {name: None if value is None else asdict(value) for name, value in metrics.items()}
    rounds = [accumulation.as_dict() for accumulation in accumulations(among) if accumulation.row is row]
    results: dict[str, Any] = {
        **table.identity(row),
        "seeds": list(row.results),
        "failures": dict(row.failures),
        "metrics": numbers,
    }
    return results | ({"rounds": rounds[0]} if rounds else {})


def _flat(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    def text(value: object) -> str:
        return ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, Mapping) else str(value)

    return [(name.replace("_", " "), text(value)) for name, value in machine.items()]
