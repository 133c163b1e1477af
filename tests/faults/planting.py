"""Run pytest with one module of ours replaced by a faulty copy. The files themselves are never touched.

Usage: python planting.py SECONDS_AT_MOST MODULE FILE_WITH_ITS_SOURCE PYTEST_ARGUMENTS…
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import resource
import sys
from pathlib import Path


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


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
    sys.meta_path.insert(0, Planter(sys.argv[1], Path(sys.argv[2])))
    import pytest

    sys.exit(pytest.main(sys.argv[3:]))
