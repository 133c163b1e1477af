"""A test fails for every planted fault of looped models, and for the right reason."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("faults_planted_looped", Path(__file__).with_name("planted_looped.py"))
assert spec is not None
assert spec.loader is not None
planted = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = planted
spec.loader.exec_module(planted)


@pytest.mark.slow
@pytest.mark.parametrize("fault", planted.FAULTS, ids=lambda fault: fault.name)
def test_its_test_fails(fault, tmp_path):
    pytest.importorskip("torch")
    found = importlib.util.find_spec(fault.where)
    text = Path(found.origin).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    (tmp_path / "planted.py").write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    planting = str(Path(__file__).with_name("planting.py"))
    pytest_arguments = ["-q", "-p", "no:cacheprovider", fault.test]
    done = subprocess.run(
        [sys.executable, planting, "300", fault.where, str(tmp_path / "planted.py"), *pytest_arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, f"not caught: {done.stdout[-2000:]}{done.stderr[-2000:]}"  # 1: a test has failed
    assert re.search("1 failed", done.stdout)
    assert re.search(f"E .*{fault.reason}", done.stdout), f"caught for another reason: {done.stdout[-2000:]}"
