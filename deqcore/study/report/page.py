"""What a study leaves behind: results.json, results.csv, results.md and one page of HTML that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deqcore.pages import template
from deqcore.study import store
from deqcore.study.labels import head
from deqcore.study.report import answers, provenance, table
from deqcore.study.report.gates import judge
from deqcore.study.report.plots import name, plots
from deqcore.study.report.retraining import Accumulation, accumulations
from deqcore.study.report.summary import METRICS, Interval, SummaryRow, rows
from deqcore.study.settings import Study
from deqcore.study.translations import LANGUAGES, say


def write(root: Path, study: Study, results: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> list[SummaryRow]:
    """Write all files of the report.

    Args:
        root: the directory of the study.
        study: its settings.
        results: of its cells.
        about: the `machine` of results that do not name theirs, and the `command` that reproduces the study.

    Returns:
        The rows of the table.
    """
    value = rows(results)
    about = {**about, "machines": provenance.machines(results, about["machine"])}
    verdict = judge(value, study.gates)
    summary = [_summary(row, value) for row in value]
    judged = [gate.as_dict() for gate in verdict.gates]
    content = {**about, "settings": study.model_dump(), "summary": summary, "gates": judged, "cells": list(results)}
    store.write_json(root / "results.json", content)
    store.write(root / "results.csv", table.comma_separated(value).encode())
    store.write(root / "results.md", table.markdown(value).encode())
    store.write(root / "report.html", page(study, value, about).encode())
    return value


def page(study: Study, rows: Sequence[SummaryRow], about: Mapping[str, Any]) -> str:
    """Return the HTML. Every name in it is escaped: a class or a data set may be called anything."""
    language = study.language
    header, lines = table.cells(rows)
    verdict = judge(rows, study.gates, language)
    sections = answers.answers(rows, study)
    return render(
        "report.html.j2",
        language,
        title=say(language, "title", name=study.name),
        answers=sections,
        line_heads=answers.heads(language),
        gates=[gate.as_dict() for gate in verdict.gates],
        verdict={"go": verdict.go, "text": verdict.sentence(language)},
        shared=table.shared(rows, lambda title: head(language, title)),
        header=[head(language, title) for title in header],
        lines=[_sortable(line, row) for line, row in zip(lines, rows, strict=True)],
        labels=len(header) - len(table.COLUMNS),
        rounds=[_round(accumulation, rows, language) for accumulation in accumulations(rows)],
        plots=[{"title": say(language, word), "svg": svg} for word, svg in plots(rows, language).items()],
        command=about["command"],
        machines=[provenance.facts(machine, language) for machine in about["machines"]],
        mixed=say(language, "mixed", count=len(about["machines"])) if len(about["machines"]) > 1 else "",
        settings=json.dumps(study.model_dump(), indent=1, ensure_ascii=False),
        rendered=provenance.rendered(language),
    )


def render(file: str, language: str, **values: Any) -> str:
    """Fill a template of this folder with values and the texts of a language."""
    return template.render("deqcore.study.report", file, language=language, words=LANGUAGES[language], **values)


def _sortable(line: Sequence[str], row: SummaryRow) -> list[tuple[str, float | None]]:
    """Return the cells of a row with the numbers by which they are sorted; labels have none."""
    figures = table.values(row)
    return list(zip(line, [*[None] * (len(line) - len(figures)), *figures], strict=True))


def _round(accumulation: Accumulation, rows: Sequence[SummaryRow], language: str) -> dict[str, Any]:
    """Return a line of the table of rounds and its verdict."""
    row = accumulation.row
    gaps = accumulation.gap or (None,) * len(accumulation.accuracy)
    values = [table.percent(value) + _gap(gap) for value, gap in zip(accumulation.accuracy, gaps, strict=True)]
    heads = [say(language, "round", number=number) for number in range(1, len(values) + 1)]
    word = "builds_up" if accumulation.builds_up else "no_build_up"
    verdict = "" if accumulation.builds_up is None else say(language, word, strategy=row.label, solver=row.solver)
    growth = answers.bracketed(accumulation.growth, 100.0, 2, signed=True)
    return {"label": name(row, rows), "heads": heads, "values": [*values, growth], "verdict": verdict}


def _gap(value: Interval | None) -> str:
    return "" if value is None else f" ({100 * value.mean:+.2f})".replace("-", "−")


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
