"""The outcome of a conformance run as a table, as JSON and as JUnit's XML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deqcore.testing.runner.conformance import CaseOutcome, SuiteRequest, ok
from deqcore.testing.runner.isolation import NOT_RUN

LISTED: Final = 15


def as_json(request: SuiteRequest, outcomes: Sequence[CaseOutcome], seconds: float) -> dict[str, object]:
    """Return everything as plain values."""
    return {
        "ok": ok(outcomes),
        "kind": request.kind,
        "name": request.name,
        "seconds": round(seconds, 2),
        "tests": [asdict(outcome) for outcome in outcomes],
    }


def table(request: SuiteRequest, outcomes: Sequence[CaseOutcome], seconds: float) -> RenderableType:
    """Return one line per test, one column per backend, then a description of each failure."""
    backends = list(dict.fromkeys(outcome.backend for outcome in outcomes))
    made = Table(f"{request.kind} {request.name}", box=box.SIMPLE_HEAD, pad_edge=False)
    for backend in backends:
        made.add_column(backend, justify="right")
    for check in dict.fromkeys(outcome.check for outcome in outcomes):
        cells = [
            _cell([outcome for outcome in outcomes if (outcome.check, outcome.backend) == (check, backend)])
            for backend in backends
        ]
        made.add_row(sentence(check), *cells)
    return Group(made, *_failures(outcomes), _summary(outcomes, seconds))


def sentence(check: str) -> str:
    """Return a test's name as the promise that it is."""
    text = re.sub(r"\bnan\b", "NaN", check.removeprefix("test_").replace("_", " "))
    return text[:1].upper() + text[1:]


def _cell(cases: Sequence[CaseOutcome]) -> Text:
    ran = [item for item in cases if item.outcome != "skipped"]
    left_out = sum(item.not_run for item in ran)
    failed = sum(item.outcome == "failed" for item in ran) - left_out
    expected = sum(item.outcome == "expected" for item in ran)
    if failed:
        return Text(f"✗ {failed} of {len(ran)}", style="bold red")
    if left_out:
        return Text(NOT_RUN, style="red")
    if not ran:
        return Text("–", style="dim")
    available = f" ({expected} known to fail)" if expected else ""
    return Text(f"✓ {len(ran)}{available}", style="yellow" if expected else "green")


def _failures(outcomes: Sequence[CaseOutcome]) -> Iterable[Text]:
    groups: dict[str, list[str]] = {}
    for item in outcomes:
        if item.outcome == "failed":
            groups.setdefault(item.message.removeprefix("AssertionError: "), []).append(item.test)
    for message, names in list(groups.items())[:LISTED]:
        others = f" and {tests(len(names) - 1)} more" if len(names) > 1 else ""
        yield Text(f"✗ {names[0]}{others}: {message}", style="red")
    if len(groups) > LISTED:
        yield Text(f"… and {len(groups) - LISTED} more (--json lists them all)", style="red")


def tests(count: int) -> str:
    """Return "1 test" or "2 tests"."""
    return f"{count} test{'' if count == 1 else 's'}"


def _summary(outcomes: Sequence[CaseOutcome], seconds: float) -> Text:
    count = {
        kind: sum(outcome.outcome == kind for outcome in outcomes)
        for kind in ("passed", "failed", "expected", "skipped")
    }
    text = Text()
    left_out = sum(outcome.not_run for outcome in outcomes)
    if count["failed"]:
        text.append(f"{tests(count['failed'] - left_out)} failed", style="bold red")
        text.append(f", {left_out} were not run" if left_out else "")
        text.append(f", {count['passed']} passed")
    elif count["passed"] or count["expected"]:
        text.append(f"{tests(count['passed'])} passed", style="bold green")
    else:
        text.append("No test ran", style="bold red")
    if count["expected"]:
        text.append(f", {count['expected']} failed as expected")
    if count["skipped"]:
        text.append(f", {count['skipped']} do not apply")
    text.append(f" ({seconds:.0f} s).")
    return text


def junit(request: SuiteRequest, outcomes: Sequence[CaseOutcome]) -> str:
    """Return JUnit's XML, one suite per backend."""
    root = ET.Element("testsuites", name=f"deqcore check {request.kind} {request.name}")
    for backend in dict.fromkeys(outcome.backend for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.backend == backend]
        count = {kind: str(sum(item.outcome == kind for item in own)) for kind in ("failed", "skipped", "expected")}
        suite = ET.SubElement(
            root,
            "testsuite",
            name=f"{request.kind} {request.name} on {backend}",
            tests=str(len(own)),
            failures=count["failed"],
            errors="0",
            skipped=str(int(count["skipped"]) + int(count["expected"])),
            time=f"{sum(item.seconds for item in own):.3f}",
        )
        for item in own:
            case = ET.SubElement(
                suite, "testcase", classname=f"deqcore.{request.kind}", name=item.test, time=f"{item.seconds:.3f}"
            )
            if item.outcome == "failed":
                ET.SubElement(case, "failure", message=item.message).text = item.detail
            elif item.outcome != "passed":
                ET.SubElement(case, "skipped", message=item.message)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True)
