"""Run pytest with one module of ours replaced by a faulty copy. The files themselves are never touched.

Usage: python planting.py PACKAGE…

It imports the packages, none of them ours, and forks a process for each line of its input: a JSON object with `module`,
`source` (a file with the faulty text), `seconds` (of processor time, at most), `arguments` (of pytest) and `output` (a
file). `chosen` (tests to run, in order) and `record` (arguments of `reach.Recorder`) may be added. It answers with a
line, the exit code of that process. So the packages are imported once for all faults, and our own modules are compiled
once: the processes share their bytecode in a folder that is deleted at the end.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import reach


class Planter(importlib.abc.MetaPathFinder):
    """Finds the one module, before anybody else does, and gives it another source."""

    def __init__(self, module: str, source: Path) -> None:
        self.module = module
        self.source = source

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = Planted(name, spec.origin, self.source.read_text())
        return spec


class Planted(importlib.machinery.SourceFileLoader):
    """A module from its own place, with another text; no bytecode is read or written."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname):
        return compile(self.text, self.path, "exec")


def run(
    module: str,
    source: str,
    seconds: int,
    arguments: list[str],
    output: str,
    chosen: list[str] | None = None,
    record: tuple[str, str] | None = None,
) -> int:
    """Run pytest with the faulty module, in this process."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    sys.meta_path.insert(0, Planter(module, Path(source)))
    plugins = [] if chosen is None else [reach.Chosen(chosen)]
    return pytest.main(arguments, [*plugins, *([] if record is None else [reach.Recorder(*record)])])


def forked(request: dict[str, Any]) -> int:
    """Return the exit code of a fork of this process that runs the request; the negative signal that ended it."""
    child = os.fork()
    if child == 0:
        code = int(run(**request))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the cleaning up that is left to this process
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    tasks = Path("/proc/self/task")
    if tasks.exists() and len(list(tasks.iterdir())) > 1:
        raise SystemExit(f"One of {sys.argv[1:]} starts a thread when it is imported, which no fork would have.")
    with tempfile.TemporaryDirectory(prefix="deqcore-bytecode-") as folder:
        sys.pycache_prefix, sys.dont_write_bytecode = folder, False
        for line in sys.stdin:
            print(forked(json.loads(line)), flush=True)
