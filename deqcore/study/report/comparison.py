"""Two studies side by side: the rows that both have, paired by seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Group
from rich.text import Text

from deqcore.study import store
from deqcore.study.labels import head
from deqcore.study.report import answers, page, provenance, table
from deqcore.study.report.provenance import CHANGING
from deqcore.study.report.summary import Interval, SummaryRow, rows
from deqcore.study.report.terminal import fitted
from deqcore.study.translations import say

QUOTIENTS: Final = (
    ("compare_time", "step"),
    ("compare_training_time", "training"),
    ("compare_f", "evaluations"),
    ("compare_vjps", "vjps"),
    ("compare_memory", "step_memory"),
)


@dataclass(frozen=True)
class StoredStudy:
    """The results of a study, as it left them.

    Attributes:
        name: of the folder.
        rows: of its table.
        machines: that measured it.
        training: settings of the trainings, by which two studies must agree to be compared.
    """

    name: str
    rows: list[SummaryRow]
    machines: list[dict[str, Any]]
    training: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> StoredStudy:
        """Read `results.json` of a folder.

        Raises:
            StudyError: there is none, or it is not a study's.
        """
        path = folder / "results.json"
        try:
            content = store.read_json(path)
        except (OSError, ValueError) as error:
            raise store.StudyError(f"{str(path)!r} cannot be read: {error}.") from None
        if content is None:
            raise store.StudyError(
                f"{str(folder)!r} has no results.json. Give the folder of a study that has finished."
            )
        if not isinstance(content, dict) or "cells" not in content or "machine" not in content:
            raise store.StudyError(f"{str(path)!r} is not the results of a study. Give the folder of a study.")
        cells = content["cells"]
        training = {} if not cells else {**cells[0]["cell"]["training"], "max_steps": cells[0]["cell"]["max_steps"]}
        return cls(folder.name, rows(cells), provenance.machines(cells, content["machine"]), training)


def compare(old: StoredStudy, new: StoredStudy, language: str) -> dict[str, Any]:
    """Return the comparison as texts: `title`, `heads`, `lines` of cells (text, number), `notes` and `labels`."""
    new_rows, old_rows = ({_key(row): row for row in study.rows} for study in (new, old))
    common = [key for key in new_rows if key in old_rows]
    names = [index for index in range(len(table.IDENTITY)) if index == 5 or len({key[index] for key in common}) > 1]
    heads = [head(language, table.IDENTITY[index]) for index in names]
    words = ("compare_seeds", "compare_accuracy", "compare_error", *(word for word, _ in QUOTIENTS))
    return {
        "title": say(language, "compare_title", old=old.name, new=new.name),
        "heads": [*heads, *(say(language, word) for word in words)],
        "lines": [[*((key[index], None) for index in names), *_line(new_rows[key], old_rows[key])] for key in common],
        "labels": len(names),
        "warnings": _warnings(old, new, language),
        "notes": [
            say(language, "compare_note", old=old.name, new=new.name),
            *_only(old, [key for key in old_rows if key not in new_rows], language),
            *_only(new, [key for key in new_rows if key not in old_rows], language),
        ],
    }


def write(path: Path, comparison: Mapping[str, Any], language: str) -> None:
    """Write the comparison as one page of HTML."""
    store.write(path, page.render("compare.html.j2", language, **comparison).encode())


def terminal(comparison: Mapping[str, Any], width: int) -> Group:
    """Build the table for a terminal of this width."""
    lines = [[text for text, _ in line] for line in comparison["lines"]]
    table = fitted(comparison["heads"], lines, comparison["labels"], width, title=comparison["title"])
    return Group(table, Text(" ".join(comparison["notes"]), style="dim italic"))


def _key(row: SummaryRow) -> tuple[str, ...]:
    identity = table.identity(row)
    return tuple(identity[name] if name != "strategy" else row.label for name in table.IDENTITY)


def _line(new: SummaryRow, old: SummaryRow) -> list[tuple[str, float | None]]:
    """Return the seeds that both have, the difference of accuracies, both errors, and quotients."""
    both = len(set(new.results) & set(old.results))
    accuracy = new.against(old, "test_accuracy")
    errors = [row.metric("gradient_error") if row.results else None for row in (old, new)]
    cells: list[tuple[str, float | None]] = [
        (str(both), both),
        (answers.bracketed(accuracy, 100.0, 2, signed=True), _mean(accuracy)),
        (" → ".join(map(table.error, errors)), _mean(errors[1])),
    ]
    ratios = [new.ratio(old, metric) for _, metric in QUOTIENTS]
    return cells + [(answers.bracketed(ratio, 1.0, 2), _mean(ratio)) for ratio in ratios]


def _mean(value: Interval | None) -> float | None:
    return None if value is None else value.mean


def _warnings(old: StoredStudy, new: StoredStudy, language: str) -> list[str]:
    result = []
    fixed = [{_fixed(machine) for machine in run.machines} for run in (old, new)]
    if fixed[0] != fixed[1]:
        shown = [", ".join(sorted({str(m.get("cpu", "–")) for m in run.machines})) for run in (old, new)]
        result.append(say(language, "compare_machines", old=shown[0], new=shown[1]))
    names = [name for name in {**old.training, **new.training} if old.training.get(name) != new.training.get(name)]
    if names:
        result.append(say(language, "compare_training", names=", ".join(names)))
    return result


def _fixed(machine: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in machine.items() if name not in (*CHANGING, "trainings")}
    return json.dumps(kept, sort_keys=True)


def _only(study: StoredStudy, keys: Sequence[tuple[str, ...]], language: str) -> list[str]:
    shown = ", ".join(" ".join(part for part in key if part != "–") for key in keys)
    return [say(language, "compare_only", study=study.name, rows=shown)] if keys else []
