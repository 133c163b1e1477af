"""Build deqcore's wheel and those of the plugins, install them into a fresh environment, and run their suites there.

Usage: python examples/plugins/check.py [FOLDER]

What they depend on (torch, pytest, autograd, …) is taken from the environment that this runs in; deqcore and the
plugins come from their wheels alone, so that a file that is missing in a wheel is missed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PLUGINS = sorted(path.parent for path in HERE.glob("*/pyproject.toml"))


def run(*command: object, cwd: Path | None = None) -> None:
    """Run on one thread, since more cost more than they bring here, and say which command failed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        sys.exit(f"failed: {' '.join(words)}")


def build(wheels: Path) -> None:
    """Build a wheel of deqcore and of each plugin."""
    for project in (ROOT, *PLUGINS):
        pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels)
        run(*pip, project)


def environment(folder: Path, wheels: Path) -> Path:
    """Make an environment with the wheels that sees all other packages of this one, and return its Python."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    run(*pip, *sorted(wheels.glob("*.whl")))
    site = next((folder / "lib").glob("python*/site-packages"))
    # A plain path: .pth files over there are not read, so that an editable deqcore stays out of sight.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


# Is the deqcore that is found here the one from the wheel?
OWN = """
import deqcore, pathlib, sys
sys.exit(pathlib.Path(sys.prefix) not in pathlib.Path(deqcore.__file__).parents)
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="deqcore-plugins-") as name:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(name)
        build(folder / "wheels")
        python = environment(folder / "venv", folder / "wheels")
        run(python, "-P", "-c", OWN, cwd=folder)
        for plugin in PLUGINS:
            print(f"== {plugin.name}", flush=True)
            pytest = (python, "-P", "-m", "pytest", "-q", "-r", "fE", "-p", "no:cacheprovider", "--rootdir", ".")
            run(*pytest, "-n", "2", "--dist", "worksteal", "tests", cwd=plugin)


if __name__ == "__main__":
    main()
