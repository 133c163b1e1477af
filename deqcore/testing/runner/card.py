"""The report card of a conformance run: one page of HTML that needs no network."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Final

from deqcore import plugins
from deqcore.errors import MissingExtraError
from deqcore.pages.template import render
from deqcore.testing.runner.conformance import BEST, CaseOutcome, SuiteRequest, ok
from deqcore.testing.runner.isolation import NOT_RUN
from deqcore.testing.runner.render import sentence, tests

NOT_CLAIMED: Final = "not claimed"


@dataclass(frozen=True)
class Cell:
    """A property under one column of settings.

    Attributes:
        text: ✓ or ✗ with counts, "not claimed" or "–".
        style: class of the style sheet.
    """

    text: str
    style: str


@dataclass(frozen=True)
class PropertyRow:
    """A line of the table: the test's sentence, and a cell per column."""

    sentence: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class CardFailure:
    """A failed check, with the smallest of its cases that failed.

    Attributes:
        sentence: what must hold.
        columns: settings under which it fails.
        test: its name.
        message: what is wrong, and by how much.
        code: the case in a few lines, or "".
        command: that runs it alone.
    """

    sentence: str
    columns: str
    test: str
    message: str
    code: str
    command: str


@dataclass(frozen=True)
class Figure:
    """A number that a test noted; `test` is its sentence, with the case in brackets."""

    test: str
    column: str
    name: str
    value: object


@dataclass(frozen=True)
class Card:
    """What the page shows."""

    ok: bool
    verdict: str
    about: str
    columns: Sequence[str]
    rows: Sequence[PropertyRow]
    failures: Sequence[CardFailure]
    figures: Sequence[Figure]


def card(request: SuiteRequest, outcomes: Sequence[CaseOutcome], seconds: float) -> Card:
    """Collect the outcomes of a run."""
    columns = list(dict.fromkeys(outcome.backend for outcome in outcomes))
    checks = list(dict.fromkeys(outcome.check for outcome in outcomes))
    rows = [
        PropertyRow(
            sentence(check),
            [cell(case for case in outcomes if (case.check, case.backend) == (check, column)) for column in columns],
        )
        for check in checks
    ]
    bad = [case for case in outcomes if case.outcome == "failed" and not case.not_run]
    left_out = sum(case.not_run for case in outcomes)
    failing = len({case.check for case in bad})
    verdict = (
        f"{failing} of {len(checks)} properties fail: {len(bad)} check{'s' * (len(bad) > 1)}."
        + f" {tests(left_out)} after them {'was' if left_out == 1 else 'were'} not run." * bool(left_out)
        if bad
        else f"All {len(checks)} properties hold or are not claimed."
    )
    figures = [
        Figure(_case(case, request.name), case.backend, name, value)
        for case in outcomes
        for name, value in case.notes.items()
        if name != "code"
    ]
    return Card(
        ok(outcomes), verdict, about(request, columns, seconds), columns, rows, list(_failures(request, bad)), figures
    )


def cell(cases: Iterator[CaseOutcome]) -> Cell:
    """Return the cell of one property in one column."""
    listed = list(cases)
    ran = [case for case in listed if case.outcome != "skipped"]
    left_out = sum(case.not_run for case in ran)
    failed = sum(case.outcome == "failed" for case in ran) - left_out
    if failed:
        return Cell(f"✗ {failed} of {len(ran)}", "no")
    if left_out:
        return Cell(NOT_RUN, "none")
    if ran:
        expected = sum(case.outcome == "expected" for case in ran)
        return Cell(f"✓ {len(ran)}" + (f" ({expected} known to fail)" if expected else ""), "go")
    claimed = not any(case.message.startswith(NOT_CLAIMED) for case in listed)
    return Cell("–" if claimed else NOT_CLAIMED, "none")


def about(request: SuiteRequest, columns: Sequence[str], seconds: float) -> str:
    """Return versions, machine, date and time; `columns` begin with the names of the backends that ran."""
    external, backends = request.external, plugins.backends()
    named = [backends[name].package for name in (column.partition(",")[0] for column in columns) if name in backends]
    packages = ["deqcore", *(external.packages if external is not None else ()), *filter(None, named), "numpy"]
    versions = ", ".join(f"{name} {_version(name)}" for name in dict.fromkeys(packages))
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{versions}; Python {platform.python_version()} on {platform.system()}. Made on {now} in {seconds:.0f} s."


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed as a package)"


def _failures(request: SuiteRequest, bad: Sequence[CaseOutcome]) -> Iterator[CardFailure]:
    """Yield one failure per test, whatever the column; cases are listed from small to large."""
    by_test: dict[str, list[CaseOutcome]] = {}
    for outcome in bad:
        by_test.setdefault(_bare(outcome), []).append(outcome)
    for same in by_test.values():
        first = same[0]
        options = request.options
        if options is None and first.backend.endswith(BEST):
            options = plain_options(request)
        given = f" --options {shlex.quote(options)}" if options else ""
        on = "" if request.external is not None else f" --backend {first.backend}"
        paths = "".join(f" --path {shlex.quote(str(path))}" for path in request.paths)
        command = f"deqcore check {request.kind} {request.name}{on}{paths}{given} -k {shlex.quote(first.check)}"
        message = first.message.removeprefix("AssertionError: ")
        columns = ", ".join(dict.fromkeys(outcome.backend for outcome in same))
        yield CardFailure(
            sentence(first.check), columns, first.test, message, str(first.notes.get("code", "")), command
        )


def plain_options(request: SuiteRequest) -> str:
    """Return an adapter's best settings as JSON."""
    return json.dumps(dict(getattr(request.external, "best", {})))


def _case(outcome: CaseOutcome, name: str) -> str:
    """Return the sentence of a test, and its parameters if it has any beyond backend and subject."""
    case = outcome.test.partition("[")[2].removesuffix("]").rpartition(name)[2].strip("-")
    return sentence(outcome.check) + (f" ({case})" if case else "")


def _bare(outcome: CaseOutcome) -> str:
    """Return the test's name without the backend, so that columns can be compared."""
    return outcome.test.replace(outcome.backend.partition(",")[0], "")


def page(request: SuiteRequest, outcomes: Sequence[CaseOutcome], seconds: float) -> str:
    """Return the HTML.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    if not plugins.is_installed("jinja2"):
        raise MissingExtraError.of("`deqcore check … --report`", "jinja2", "monitor")
    title = f"Report card of {request.kind} {request.name}"
    return render("deqcore.testing.runner", "card.html.j2", title=title, card=card(request, outcomes, seconds))
