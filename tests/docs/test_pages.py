"""The pages do what they say: their files are written, their blocks are run, in order, in an empty folder.

A page's Python is one program; a block below "`name`:" is a file; `deqcore` and `pytest` commands are run; a table of
settings without a name is read as a config. Commands that install something are run by `make release-check`. What a
page needs and does not show is in a comment, `<!-- python ... -->`.
"""

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
from deqcore.config import Config
from deqcore.study.settings import read as read_study

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = ("benchmarks", "conformance", "evidence", "reference")  # by commands, with tests of their own
PAGES = [ROOT / "README.md", ROOT / "README.ja.md"] + [
    path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name not in WRITTEN and path.stem != "errors"
]
BLOCK = re.compile(
    r"(?:^ *`(?P<file>[\w.]+)`:\n\n)?^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^ *```$"
    r"|^<!-- python\n(?P<hidden>.*?)^-->$",
    re.M | re.S,
)
NOT_RUN = {"pip", "make", "git", "python", "torchrun", "cd", "curl", "open"}  # they install, or take long
NEEDS = {"autograd": ["autograd"], "torch": ["torch"], "jax": ["jax"], "flax": ["flax"], "equinox": ["equinox"]} | {
    name: [name] for name in ("lightning", "accelerate", "transformers")
}


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


def shell(command: str, folder: Path) -> bool:
    """Run one command of a page; False for those that are not run here."""
    words = shlex.split(command, comments=True)
    if not words or words[0] in NOT_RUN:
        return False
    module = {"deqcore": "deqcore.cli.app", "pytest": "pytest"}[words[0]]
    extra = ["-p", "no:cacheprovider"] if words[0] == "pytest" else []
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    done = subprocess.run(
        [sys.executable, "-m", module, *words[1:], *extra],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return True


def unindented(text: str, indent: str) -> str:
    return "".join(line.removeprefix(indent) for line in text.splitlines(keepends=True))


# The compiler's own warnings: of what it does not trace, of a .grad that it looks at, of what it loads.
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning:lightning")
@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(path, folder):
    page = path.read_text(encoding="utf-8")
    for word, packages in NEEDS.items():
        if re.search(rf"^(?:import|from) (?:deqcore_)?{word}\b", page, re.M):
            for package in packages:
                pytest.importorskip(package)
    module = types.ModuleType(f"page_{path.stem.replace('.', '_')}")
    sys.modules[module.__name__] = module
    for block in BLOCK.finditer(page):
        line = page[: block.start()].count("\n") + 1
        text = block["hidden"] or unindented(block["text"], block["indent"])
        if block["file"]:
            (folder / block["file"]).write_text(text, encoding="utf-8")
        elif block["hidden"] or block["language"] == "python":
            exec(compile("\n" * line + text, str(path), "exec"), module.__dict__)
        elif block["language"] == "bash":
            for command in text.strip().splitlines():
                shell(command, folder)
        elif block["language"] == "toml" and "project.entry-points" not in text:
            (folder / "shown.toml").write_text(text, encoding="utf-8")
            study = Config.load(folder / "shown.toml").section("study")
            if study:
                read_study(study, str(path))
        else:
            assert block["language"] in {"toml", "text", "console", "yaml"}, f"{path}:{line}: nothing runs this block"
    plugins.reset()


def test_there_is_a_tutorial_for_each_kind_of_author():
    found = [path.stem for path in sorted((ROOT / "docs" / "tutorials").glob("*.md"))]
    assert found == ["backend", "sink", "solver", "strategy"]


def test_a_block_that_fails_fails_its_page(folder):
    """The runner itself: it must not pass over what it does not understand."""
    with pytest.raises(ZeroDivisionError):
        for block in BLOCK.finditer("text\n\n```python\n1 / 0\n```\n"):
            exec(block["text"], {})
    with pytest.raises(KeyError):
        shell("rm -rf nothing", folder)
    with pytest.raises(AssertionError):
        shell("deqcore solvers --no-such-option", folder)
