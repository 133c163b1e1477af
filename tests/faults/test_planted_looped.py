"""A test fails for every planted fault of looped models, and for the right reason."""

from __future__ import annotations

import importlib.util
import json
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
    source, output = tmp_path / "planted.py", tmp_path / "output.txt"
    source.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    task = {
        "module": fault.where,
        "source": str(source),
        "seconds": 300,
        "arguments": ["-q", "-p", "no:cacheprovider", fault.test],
        "output": str(output),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("planting.py")), "numpy"],
        input=json.dumps(task) + "\n",
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    said = output.read_text(encoding="utf-8", errors="replace")
    assert int(done.stdout) == 1, f"not caught: {said[-2000:]}"  # 1: a test has failed
    assert re.search("1 failed", said)
    assert re.search(f"E .*{fault.reason}", said), f"caught for another reason: {said[-2000:]}"
