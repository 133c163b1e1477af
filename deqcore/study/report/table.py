"""The table at the end of a study, for the terminal, for Markdown and for CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any, Final

from rich.console import Group
from rich.text import Text

from deqcore.study.labels import head
from deqcore.study.report.summary import METRICS, Interval, SummaryRow
from deqcore.study.report.terminal import fitted
from deqcore.study.translations import say


def percent(value: Interval | None) -> str:
    """Return an accuracy, with half the width of its interval."""
    return _with_half(value, 100.0, 2, "") if value else "–"


def milliseconds(value: Interval | None) -> str:
    """Return the seconds as milliseconds, three digits."""
    return "–" if value is None else significant(1e3 * value.mean)


def seconds(value: Interval | None) -> str:
    """Format seconds."""
    return "–" if value is None else significant(value.mean)


def megabytes(value: Interval | None) -> str:
    """Return the bytes as MB."""
    return "–" if value is None else significant(value.mean / 1e6)


def count(value: Interval | None) -> str:
    """Return a mean number of evaluations."""
    return "–" if value is None else f"{value.mean:.1f}"


def cosine(value: Interval | None) -> str:
    """Return a cosine, four decimals: 0.9996 and 1 are different answers."""
    return "–" if value is None else f"{value.mean:.4f}"


def error(value: Interval | None) -> str:
    """Return a relative error, two digits."""
    return "–" if value is None else relative(value.mean)


def relative(value: float) -> str:
    """Return two significant digits."""
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.2g}"


def significant(value: float) -> str:
    """Return three significant digits; an exponent only where there would be nothing else to see."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.2e}"
    digits = max(0, 2 - int(f"{abs(value):e}".partition("e")[2]))
    return f"{value:.{min(digits, 6)}f}"


def _with_half(value: Interval, scale: float, digits: int, unit: str) -> str:
    text = f"{scale * value.mean:.{digits}f}"
    if value.high is not None:
        text += f" ± {scale * (value.high - value.mean):.{digits}f}"
    return text + unit


COLUMNS: Final[tuple[tuple[str, str, Callable[[Interval | None], str]], ...]] = (
    ("gradient error", "gradient_error", error),
    ("gradient cosine", "cosine", cosine),
    ("test accuracy %", "test_accuracy", percent),
    ("forward ms", "forward", milliseconds),
    ("backward ms", "backward", milliseconds),
    ("step ms", "step", milliseconds),
    ("training s", "training", seconds),
    ("process s", "seconds", seconds),
    ("step MB", "step_memory", megabytes),
    ("f forward", "evaluations", count),
    ("vjps backward", "vjps", count),
)
IDENTITY: Final = ("data", "backend", "model", "solver", "rtol", "strategy")


def identity(row: SummaryRow) -> dict[str, str]:
    """Return what a row is."""
    data, backend, model, _ = row.place
    solver, rtol = ("–", "–") if row.explicit else (row.solver, f"{row.rtol:g}")
    values = (data, backend, model, solver, rtol, "–" if row.explicit else row.strategy)
    return dict(zip(IDENTITY, values, strict=True))


def cells(rows: Sequence[SummaryRow]) -> tuple[list[str], list[list[str]]]:
    """Return the header and lines; what is the same in all lines is left out, except for the strategy."""
    identities = [identity(row) for row in rows]
    varying = [name for name in IDENTITY if name == "strategy" or len({item[name] for item in identities}) > 1]
    lines = []
    for row, each in zip(rows, identities, strict=True):
        figures = [form(row.metric(metric)) if row.results else "–" for _, metric, form in COLUMNS]
        lines.append([each[name] for name in varying] + figures)
    return [*varying, *(title for title, _, _ in COLUMNS)], lines


def shared(rows: Sequence[SummaryRow], head: Callable[[str], str] = str) -> str:
    """Describe what all rows have in common; `head` gives the names of columns in another language."""
    identities = [identity(row) for row in rows]
    return ", ".join(
        f"{head(name)} {identities[0][name]}" for name in IDENTITY if len({item[name] for item in identities}) == 1
    )


def values(row: SummaryRow) -> list[float | None]:
    """Return the means behind the figures of `cells`, by which a page sorts."""
    metrics = [row.metric(metric) if row.results else None for _, metric, _ in COLUMNS]
    return [None if value is None else value.mean for value in metrics]


def terminal(rows: Sequence[SummaryRow], width: int, language: str = "en") -> Group:
    """Build the table for a terminal of this width."""
    header, lines = cells(rows)
    title = shared(rows, lambda name: head(language, name))
    labels = len(header) - len(COLUMNS)
    styles = ["" if row.results else "red" for row in rows]
    table = fitted([head(language, name) for name in header], lines, labels, width, title=title, styles=styles)
    return Group(table, Text(say(language, "table_note"), style="dim italic"))


def markdown(rows: Sequence[SummaryRow]) -> str:
    """Build the table as Markdown, for a README."""
    header, lines = cells(rows)
    escaped = [[item.replace("|", "\\|") for item in line] for line in lines]
    rule = ["---"] * len(header)
    body = "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *escaped])
    return f"{shared(rows)}\n\n{body}\n\n{say('en', 'table_note')}\n"


def comma_separated(rows: Sequence[SummaryRow]) -> str:
    """Return one line per cell, unrounded."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*IDENTITY, "seed", *METRICS, "failure"])
    for row in rows:
        values: list[Any] = list(identity(row).values())
        for seed, result in row.results.items():
            writer.writerow([*values, seed, *(read(result) for read in METRICS.values()), ""])
        for seed, reason in row.failures.items():
            writer.writerow([*values, seed, *[None] * len(METRICS), reason])
    return out.getvalue()
