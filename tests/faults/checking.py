"""Check a faulty copy with the conformance suite, in a process of its own."""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path

from deqcore.testing.runner.conformance import CaseOutcome, SuiteRequest, arguments
from deqcore.testing.runner.isolation import Journal, failed
from deqcore.testing.runner.processes import environment

PLANTING = Path(__file__).with_name("planting.py")
PACKAGES = ("numpy", "optree", "asyncio", "unittest")
FRAMEWORKS = {  # with what they load when they are used; none has threads before that, which no fork would have
    "torch": ("torch", "numba", "sympy", "scipy.linalg", "filelock"),
    "jax": ("jax", "scipy.linalg"),
}
QUIET = ("-q", "-p", "no:cacheprovider")
SECONDS = 300  # of processor time, for a check that takes seconds: a machine with much else to do fails no check


def source_of(module: str) -> str:
    """The text of a module, without importing it."""
    return Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")


def check(module: str, text: str, request: SuiteRequest, backend: str) -> list[CaseOutcome]:
    """What the suite says of everything that uses `module` with this text."""
    with tempfile.TemporaryDirectory(prefix="deqcore-fault-") as name:
        results = Path(name) / "results.jsonl"
        code, said = pytest_with(module, text, arguments(request, backend, results), backend)
        if code == -signal.SIGXCPU:
            return [CaseOutcome("endless", backend, "failed", f"no answer within {SECONDS} s", "", SECONDS)]
        journal = Journal.read(results)
        entries = list(journal.entries.values())
        lines = said.strip().splitlines()
        last = lines[-1] if lines else "no message"
        if not journal.collected:
            return [CaseOutcome("import", backend, "failed", last, "", 0.0)]
        if journal.running:
            entries.append(failed(journal.running, f"the process ended with code {code}: {last}"))
        return [CaseOutcome(**each, backend=backend) for each in entries]


def pytest_with(
    module: str, text: str, arguments: list[str], backend: str, seconds: int = SECONDS, **more: object
) -> tuple[int, str]:
    """Run pytest where `module` has this text, with more of `planting.run`; return its exit code and output."""
    with tempfile.TemporaryDirectory(prefix="deqcore-fault-") as name:
        source, output = Path(name) / "planted.py", Path(name) / "output.txt"
        source.write_text(text, encoding="utf-8")
        task = {"module": module, "source": str(source), "seconds": seconds, "output": str(output), **more}
        code = run({**task, "arguments": arguments}, backend)
        return code, output.read_text(encoding="utf-8", errors="replace")


def run(task: dict[str, object], backend: str) -> int:
    """Run pytest in a fork of the process that has imported the packages; return its exit code."""
    server = forking(threading.get_ident(), FRAMEWORKS.get(backend, ()))
    server.stdin.write(json.dumps(task) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


@cache
def forking(thread: int, framework: tuple[str, ...]) -> subprocess.Popen:
    """Start the process of `planting.py` for this thread and framework; it ends with this one."""
    env = {
        **environment("float64"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
    }
    command = [sys.executable, str(PLANTING), *PACKAGES, *framework]
    server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # closes its input, upon which it ends
    return server
