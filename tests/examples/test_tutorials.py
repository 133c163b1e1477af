"""The tutorials do what they say: their files are written, their blocks are run, in order, in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from deqcore import plugins

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"(?:^`(?P<file>[\w.]+)`:\n\n)?^```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples" / "plugins" / "deq_autograd")
    plugins.reset()
    yield tmp_path
    plugins.reset()
    local = (str(tmp_path), str(ROOT / "examples"))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(local):
            del sys.modules[name]


def shell(command: str, folder: Path) -> None:
    program, *words = shlex.split(command)
    module = {"deqcore": "deqcore.cli.app", "pytest": "pytest"}[program]
    extra = ["-p", "no:cacheprovider"] if program == "pytest" else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    done = subprocess.run(
        [sys.executable, "-m", module, *words, *extra], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path, folder):
    if path.stem == "backend":
        pytest.importorskip("autograd")
    module = types.ModuleType(f"tutorial_{path.stem}")
    sys.modules[module.__name__] = module
    ran = 0
    for block in BLOCK.finditer(path.read_text(encoding="utf-8")):
        text, line = block["text"], path.read_text(encoding="utf-8")[: block.start()].count("\n") + 1
        if block["file"]:
            (folder / block["file"]).write_text(text, encoding="utf-8")
        elif block["language"] == "python":
            exec(compile("\n" * line + text, str(path), "exec"), module.__dict__)
            ran += 1
        elif block["language"] == "bash":
            for command in text.strip().splitlines():
                shell(command, folder)
                ran += 1
    assert ran >= 2


def test_there_is_one_for_each_kind_of_author():
    assert [path.stem for path in TUTORIALS] == ["backend", "sink", "solver", "strategy"]
