"""The table of other libraries' solvers: the page is that of its results, and every failure has a script."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import field

DOCS = Path(__file__).resolve().parents[2] / "docs" / "field"
STORED = json.loads((DOCS / "results.json").read_text())
RESULTS = STORED["results"]


def test_the_page_is_that_of_the_stored_results():
    assert (DOCS / "index.md").read_text() == field.page(RESULTS, STORED["about"])


def test_ten_solvers_of_six_libraries_were_judged():
    ran = [name for name, result in RESULTS.items() if not result["error"]]
    assert len(ran) >= 10
    assert len({name.partition("-")[0] for name in ran} - {"deqcore"}) >= 6


def test_every_failure_has_a_script_and_a_text():
    text = (DOCS / "failures.md").read_text()
    for name, result in RESULTS.items():
        for check in result["checks"]:
            if check["failures"]:
                assert f"`{name}`" in text, f"{name} fails {check['check']}, and failures.md does not name it"
    for script in re.findall(r"`examples/adapters/failures/(\w+\.py)`", text):
        assert (field.ADAPTERS / "failures" / script).is_file()


def test_the_page_says_how_long_the_cards_took_and_beside_what():
    quick, slow = {"seconds": 40, "load": 0.3}, {"seconds": 130, "load": 1.2}
    said = field.timing({"a": quick, "b": slow})
    assert said.startswith("1 of 2 took at most 120 s, and the slowest, `b`, took 130 s.")
    assert said.endswith("was 0.3 to 1.2.")
    assert "1 were made beside other work" in field.timing({"a": quick, "b": {"seconds": 50}})


@pytest.mark.parametrize(
    ("check", "text"),
    [
        ({"ran": 3, "failures": [{}], "skipped": ""}, "✗ 1 of 3"),
        ({"ran": 3, "failures": [], "skipped": ""}, "✓"),
        ({"ran": 0, "failures": [], "skipped": "not claimed"}, "*not claimed*"),
        ({"ran": 0, "failures": [], "skipped": "traced code calls f once"}, "–"),
    ],
)
def test_a_cell_counts_failures(check, text):
    result = {"error": "", "checks": [{"check": "test_x", "column": "default", **check}]}
    assert field.cell(result, "test_x") == text


def test_default_and_best_settings_share_a_cell():
    good, bad = {"ran": 1, "failures": [], "skipped": ""}, {"ran": 1, "failures": [{}], "skipped": ""}
    checks = [{"check": "x", "column": "best", **good}, {"check": "x", "column": "default", **bad}]
    assert field.cell({"error": "", "checks": checks}, "x") == "✗ 1 of 1 / ✓"
    assert field.cell({"error": "it died", "checks": []}, "x") == "did not run"
