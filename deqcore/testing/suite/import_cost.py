"""Whether a plugin can be listed, and a solver or strategy imported, without importing a framework."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from typing import Final

from deqcore import plugins

PROGRAM: Final = """
import sys, importlib
from deqcore import plugins
for name in sys.argv[1].split(","):
    importlib.import_module(name)
print(",".join(sorted(set(sys.argv[2].split(",")) & set(sys.modules))))
"""


def frameworks() -> tuple[str, ...]:
    """Import names of the frameworks of all registered backends."""
    return tuple(spec.package for spec in plugins.backends().values() if spec.package)


def check_light(kind: plugins.Kind, name: str) -> None:
    """Fail if what registers a name, or the target of a solver or strategy, imports a framework.

    A backend's target may import its own framework, but the module with its hooks may not.
    """
    target = plugins.spec(kind, name).target.partition(":")[0]
    heavy = [status.name for status in plugins.plugins_status() if status.status == "heavy"]
    assert not heavy, f"the plugins {heavy} import a framework when they are listed: see `deqcore plugins`"
    if kind == "backend" or target in ("__main__", "builtins") or target.startswith("deqfile_"):
        return
    result = _imported(target, frameworks(), os.pathsep.join(part for part in sys.path if part))
    assert not result, f"{target} imports {result}, but solvers and strategies must not import a framework"


@cache  # the answer is the same for every backend
def _imported(target: str, frameworks: tuple[str, ...], path: str) -> str:
    """Return which frameworks a fresh process with this search path has imported with `target`."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, target, ",".join(frameworks)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode else done.stdout.strip()  # a module that only this process knows, such as a test's own
