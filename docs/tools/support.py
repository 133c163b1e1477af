"""Write docs/support.md: what works with which framework and strategy, and the test that shows it.

    python docs/tools/support.py

The rows are the marks `pytest.mark.supports(feature, backends=…, strategies=…, answer=…)` of the tests, so that no row
is without a test. Words are separated by spaces; the answer is "yes" unless the mark gives another one.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "support.md"
FOLDERS = ("tests", "deqcore/testing/suite")
FRAMEWORKS = {"numpy": "NumPy", "torch": "PyTorch", "jax": "JAX"}
INTRO = """# Support matrix

"Refused" is an error that says what works instead. "All" strategies are the built-in ones, each with its own test case.
Each row is a mark on a test; `python docs/tools/support.py` writes this page, and a test compares the two.

| feature | framework | strategy | answer | test |
|---|---|---|---|---|
"""


class Row(NamedTuple):
    """One answer."""

    feature: str
    framework: str
    strategy: str
    answer: str
    test: str


def marks(path: Path) -> Iterator[Row]:
    """Yield the rows of a file of tests."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "supports":
                    test = f"`{path.relative_to(ROOT).as_posix()}::{node.name}`"
                    yield from _rows(ast.literal_eval(call.args[0]), call.keywords, test)


def _rows(feature: str, keywords: list[ast.keyword], test: str) -> Iterator[Row]:
    given = {each.arg: ast.literal_eval(each.value) for each in keywords}
    for backend in given["backends"].split():
        yield Row(feature, FRAMEWORKS[backend], given["strategies"], given.get("answer", "yes"), test)


def collect() -> list[Row]:
    """Return all rows, by feature and framework."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    order = list(FRAMEWORKS.values())
    rows = {row for path in paths for row in marks(path)}
    return sorted(rows, key=lambda row: (row.feature.strip("`").lower(), order.index(row.framework), row))


def render(rows: list[Row]) -> str:
    """Return the page."""
    return INTRO + "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(render(collect()), encoding="utf-8")
