"""Check a faulty copy with the conformance suite, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from deqcore.testing.runner.conformance import CaseOutcome, SuiteRequest, arguments
from deqcore.testing.runner.isolation import Journal, failed
from deqcore.testing.runner.processes import environment

PLANTING = Path(__file__).with_name("planting.py")
SECONDS = 300  # of processor time, for a check that takes seconds: a machine with much else to do fails no check


def source_of(module: str) -> str:
    """The text of a module, without importing it."""
    return Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")


def check(module: str, text: str, request: SuiteRequest, backend: str) -> list[CaseOutcome]:
    """What the suite says of everything that uses `module` with this text."""
    with tempfile.TemporaryDirectory(prefix="deqcore-fault-") as name:
        folder = Path(name)
        (folder / "planted.py").write_text(text, encoding="utf-8")
        results = folder / "results.jsonl"
        args = arguments(request, backend, results)
        env = {
            **environment("float64"),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
        }
        command = [sys.executable, str(PLANTING), str(SECONDS), module, str(folder / "planted.py"), *args]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode == -signal.SIGXCPU:
            return [CaseOutcome("endless", backend, "failed", f"no answer within {SECONDS} s", "", SECONDS)]
        journal = Journal.read(results)
        entries = list(journal.entries.values())
        lines = (done.stdout + done.stderr).strip().splitlines()
        last = lines[-1] if lines else "no message"
        if not journal.collected:
            return [CaseOutcome("import", backend, "failed", last, "", 0.0)]
        if journal.running:
            entries.append(failed(journal.running, f"the process ended with code {done.returncode}: {last}"))
        return [CaseOutcome(**each, backend=backend) for each in entries]
