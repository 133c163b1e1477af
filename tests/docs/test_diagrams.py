"""The committed diagrams are what their script draws, and the names in them are names of the tree."""

from __future__ import annotations

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*(ROOT / "deqcore").rglob("*.py"), *(ROOT / "backends").rglob("*.py")]


def load():
    spec = importlib.util.spec_from_file_location("docs_tools_diagrams", ROOT / "docs" / "tools" / "diagrams.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


DIAGRAMS = load()
DRAWN = DIAGRAMS.drawings()


@pytest.mark.parametrize("name", DRAWN)
def test_a_committed_diagram_is_what_the_script_draws(name):
    path = ROOT / "docs" / "pictures" / f"{name}.svg"
    assert path.read_text(encoding="utf-8") == DRAWN[name], "python docs/tools/diagrams.py"
    ElementTree.fromstring(DRAWN[name])  # well-formed


def exists(name: str) -> bool:
    """A module of deqcore, a backend's package, or a class or function that some module defines."""
    path = Path(*name.split("."))
    folders = [ROOT / "deqcore", ROOT / "backends"]
    if any((folder / path).is_dir() or (folder / path).with_suffix(".py").is_file() for folder in folders):
        return True
    defined = re.compile(rf"^ *(?:class|def) {name}\b", re.M)
    return any(defined.search(source.read_text(encoding="utf-8")) for source in SOURCES)


@pytest.mark.parametrize("name", sorted(DIAGRAMS.NAMES))
def test_a_name_in_a_diagram_exists(name):
    assert exists(name), f"{name} is in docs/tools/diagrams.py, but neither a module nor a class nor a function"


@pytest.mark.parametrize("stop", [*DIAGRAMS.FORWARD, *DIAGRAMS.BACKWARD], ids=lambda stop: stop.name)
def test_a_name_is_defined_in_the_file_beside_it(stop):
    place = ROOT / stop.file.rstrip("…")
    files = [place] if place.is_file() else list(place.rglob("*.py"))
    defined = re.compile(rf"^ *(?:class|def) {stop.name}\b", re.M)
    assert any(defined.search(path.read_text(encoding="utf-8")) for path in files), stop


def test_a_name_that_is_gone_is_found_out():
    assert not exists("solve.nowhere")
    assert not exists("NoSuchClass")


@pytest.mark.parametrize("lower", range(1, len(DIAGRAMS.ROOMS)))
def test_no_room_imports_from_one_above_when_it_is_loaded(lower):
    """Imports at the top of a module, which decide what loads what; `cli` is highest."""
    above = [name for names, *_ in DIAGRAMS.ROOMS[:lower] for name in names.split(" · ")]
    pattern = re.compile(rf"^from deqcore\.({'|'.join(map(re.escape, above))})(?:\.\S+)? import", re.M)
    for name in DIAGRAMS.ROOMS[lower][0].split(" · "):
        path = ROOT / "deqcore" / Path(*name.split("."))
        files = list(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            found = pattern.search(file.read_text(encoding="utf-8"))
            assert found is None, f"{file.relative_to(ROOT)}: {found and found[0]}"


def test_badges_say_what_the_package_says():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = [each.rpartition(" ")[2] for each in project["classifiers"] if re.search(r"Python :: 3\.\d+$", each)]
    assert f"python: {versions[0]} – {versions[-1]}" in DRAWN["badge-python"]
    assert project["requires-python"] == f">={versions[0]}"
    assert f"licence: {project['license']}" in DRAWN["badge-licence"]
    status = next(each for each in project["classifiers"] if each.startswith("Development Status"))
    assert f"status: {status.rpartition(' ')[2].lower()}" in DRAWN["badge-status"]


@pytest.mark.parametrize("page", ["README.md", "README.ja.md"])
def test_links_of_a_readme_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = {target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target}
    assert len(targets) > 20
    for target in targets:
        path, _, anchor = target.partition("#")
        file = ROOT / (path or page)
        assert file.exists(), target
        if anchor:
            heads = [head.lower() for head in re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)]
            assert anchor in [re.sub(r"[^\w -]", "", head).replace(" ", "-") for head in heads], target
