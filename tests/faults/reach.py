"""Which tests reach which lines, and plugins of pytest that record this, or run chosen tests in a given order.

A test that runs no part of a statement cannot tell what a change in it does, so that a mutant needs only the tests that
reach its statement, the cheapest first. The record is made once, on the code as it is; a test that fails there judges
nothing. What a fixture of a wider scope has run counts for every test that uses it.
"""

from __future__ import annotations

import ast
import json
import time
from pathlib import Path

import coverage
import pytest

MUTATED = ("solvers", "backward", "linear")


def key(item: pytest.Item) -> str:
    """The name of a test without its folder: `test_file.py::Class::test[parameters]`."""
    return f"{item.path.name}::{item.nodeid.partition('::')[2]}"


class Recorder:
    """Writes `{test: {"seconds", "passed", "lines": {file: [lines]}}}` for the files of a folder."""

    def __init__(self, result: str, folder: str) -> None:
        self.result, self.folder = Path(result), Path(folder)
        included = [f"{folder}/{package}/*" for package in MUTATED]  # all other code runs at its own speed
        self.cov = coverage.Coverage(data_file=None, include=included, config_file=False, messages=False)
        self.tests: dict[str, dict[str, object]] = {}
        self.fixtures: dict[str, set[str]] = {}
        self.current = ""
        self.cov.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.current = key(item)
        self.fixtures[self.current] = set(item.fixturenames)
        self.tests[self.current] = {"seconds": 0.0, "passed": True}
        self.cov.switch_context(self.current)
        start = time.process_time()
        result = yield
        self.tests[self.current]["seconds"] = round(time.process_time() - start, 4)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.scope == "function":
            return (yield)
        self.cov.switch_context(f"fixture {fixturedef.argname}")
        result = yield
        self.cov.switch_context(self.current)
        return result

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.tests[self.current]["passed"] = False

    def pytest_sessionfinish(self) -> None:
        self.cov.stop()
        data = self.cov.get_data()
        seen: dict[str, dict[str, list[int]]] = {}
        for file in data.measured_files():
            name = Path(file).relative_to(self.folder).as_posix()
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in contexts:
                    seen.setdefault(context, {}).setdefault(name, []).append(line)
        for test, found in self.tests.items():
            lines: dict[str, set[int]] = {}
            for context in (test, *(f"fixture {name}" for name in self.fixtures[test])):
                for file, numbers in seen.get(context, {}).items():
                    lines.setdefault(file, set()).update(numbers)
            found["lines"] = {file: sorted(numbers) for file, numbers in lines.items()}
        self.result.write_text(json.dumps(self.tests))


class Chosen:
    """Keeps these tests only, in this order."""

    def __init__(self, names: list[str]) -> None:
        self.place = {name: place for place, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if key(item) in self.place), key=lambda item: self.place[key(item)])


def statement(tree: ast.AST, line: int, column: int) -> tuple[set[int], bool]:
    """The lines of the innermost statement around a place without its body, and whether its function is cached."""
    best, cached = None, False
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or not (
            (node.lineno, node.col_offset) <= (line, column) < (node.end_lineno, node.end_col_offset)
        ):
            continue
        if isinstance(node, ast.FunctionDef):
            cached |= any("cache" in ast.unparse(each) for each in node.decorator_list)
        if best is None or (node.lineno, node.col_offset) >= (best.lineno, best.col_offset):
            best = node
    lines = set(range(best.lineno, best.end_lineno + 1))
    for name in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(best, name, []):
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                lines -= set(range(child.lineno, child.end_lineno + 1))
    return lines, cached


def reaching(record: dict[str, dict[str, object]], file: str, lines: set[int] | None) -> list[str]:
    """Tests that pass on the code as it is and run one of these lines of `file` (None: any), the cheapest first."""
    found = [
        (each["seconds"], test)
        for test, each in record.items()
        if each["passed"] and (each["lines"].get(file) if lines is None else lines & set(each["lines"].get(file, ())))
    ]
    return [test for _, test in sorted(found)]
