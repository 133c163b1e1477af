"""A test of the project fails for every fault that the conformance suite cannot see, and for the right reason."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load(name: str):
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"faults_by_test_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


checking, planted = load("checking"), load("planted_by_test")


@pytest.mark.slow
@pytest.mark.parametrize("fault", planted.FAULTS, ids=lambda fault: fault.name)
def test_its_test_fails(fault, tmp_path):
    if (backend := fault.where.partition(".")[0].removeprefix("deqcore_")) in ("torch", "jax"):
        pytest.importorskip(backend)
    text = checking.source_of(fault.where)
    assert text.count(fault.old) == 1
    source, output = tmp_path / "planted.py", tmp_path / "output.txt"
    source.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    task = {"module": fault.where, "source": str(source), "seconds": checking.SECONDS, "output": str(output)}
    code = checking.run({**task, "arguments": ["-q", "-p", "no:cacheprovider", str(ROOT / fault.test)]}, "torch")
    said = output.read_text(encoding="utf-8", errors="replace")
    assert code == 1, f"not caught: {said[-2000:]}"  # 1: a test has failed
    assert re.search("1 failed", said)
    assert re.search(f"E .*{fault.reason}", said), f"caught for another reason: {said[-2000:]}"
