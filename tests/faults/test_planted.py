"""Every planted fault is caught by the check of the suite, or by our own test, that names it, and in its words."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest


def load(name: str):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"faults_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


checking, planted, by_test = load("checking"), load("planted"), load("planted_by_test")
ROOT = Path(__file__).parents[2]


def skip_without(backend: str) -> None:
    if backend in ("torch", "jax"):
        pytest.importorskip(backend)


@pytest.mark.slow
@pytest.mark.parametrize("fault", planted.FAULTS, ids=lambda fault: fault.name)
def test_the_suite_names_it(fault):
    skip_without(fault.backend)
    text = fault.planted(checking.source_of(fault.where))
    outcomes = checking.check(fault.where, text, fault.request, fault.backend)
    failed = [each for each in outcomes if each.outcome == "failed"]
    assert {each.check for each in failed} == {fault.test}, f"not caught: {[(o.test, o.message) for o in outcomes]}"
    matching = [each for each in failed if re.search(fault.reason, f"{each.message}\n{each.detail}")]
    assert matching, f"caught for another reason: {[each.message for each in failed]}"


@pytest.mark.slow
@pytest.mark.parametrize("fault", by_test.FAULTS, ids=lambda fault: fault.name)
def test_its_test_fails(fault):
    skip_without(fault.where.partition(".")[0].removeprefix("deqcore_"))
    text = checking.source_of(fault.where)
    assert text.count(fault.old) == 1
    test = [*checking.QUIET, str(ROOT / fault.test)]
    code, said = checking.pytest_with(fault.where, text.replace(fault.old, fault.new), test, "torch")
    assert code == 1, f"not caught: {said[-2000:]}"  # 1: a test has failed
    assert re.search("1 failed", said)
    assert re.search(f"E .*{fault.reason}", said), f"caught for another reason: {said[-2000:]}"


def test_there_are_enough_of_them_and_each_has_a_name():
    names = [fault.name for fault in planted.FAULTS]
    assert len(names) >= 25
    assert len(set(names)) == len(names)


def test_a_text_that_is_not_there_cannot_be_planted():
    with pytest.raises(ValueError, match="must occur once"):
        planted.FAULTS[0].planted("")


def test_the_table_of_kinds_names_tests_and_faults_that_exist():
    page = (ROOT / "docs/notes/verification.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:4] for line in page.partition("| kind |")[2].splitlines() if line.startswith("| ")]
    names = {fault.name for fault in (*planted.FAULTS, *by_test.FAULTS)}
    assert len(rows) == 22
    for kind, tests, faults in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert named, kind
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
        named = set(re.findall(r'"([^"]+)"', faults))
        assert named, kind
        assert named <= names, kind
