"""Pages that commands write are what the commands write now, and the reference has every public name."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

from deqcore.errors import DeqcoreError

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_tools_{name}", ROOT / "docs" / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def messages():
    """Every class of errors with its texts: reading all modules takes seconds."""
    return tool("errors").collect()


def public():
    spec = importlib.util.spec_from_file_location("public", ROOT / "tests" / "core" / "test_public_names.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [(home, name) for home, names in module.PUBLIC.items() for name in names.split()]


def test_errors_md_is_true_to_the_code(messages):
    errors = tool("errors")
    assert errors.PAGE.read_text(encoding="utf-8") == errors.render(messages), "python docs/tools/errors.py"


def test_commands_md_is_true_to_the_code():
    commands = tool("commands")
    assert commands.PAGE.read_text(encoding="utf-8") == commands.render(), "python docs/tools/commands.py"


def test_support_md_is_true_to_the_tests():
    support = tool("support")
    rows = support.collect()
    assert support.PAGE.read_text(encoding="utf-8") == support.render(rows), "python docs/tools/support.py"
    assert {row.framework for row in rows if row.feature == "complex states"} == {"NumPy", "PyTorch", "JAX"}


@pytest.mark.parametrize(
    ("module", "measured", "page"),
    [("page", "results.json", "index.md"), ("accelerator.report", "accelerator.json", "accelerator.md")],
)
def test_pages_of_benchmarks_are_true_to_their_measurements(module, measured, page, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(ROOT)
    writer = importlib.import_module(f"benchmarks.{module}")
    for name in ("overheads", "curves"):
        monkeypatch.setattr(writer.plots, name, lambda *_: None)
    home = ROOT / "docs" / "benchmarks"
    writer.write(json.loads((home / measured).read_text(encoding="utf-8")), tmp_path)
    assert (tmp_path / page).read_text(encoding="utf-8") == (home / page).read_text(encoding="utf-8")


def test_the_tables_of_evidence_are_true_to_its_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    evidence = importlib.import_module("benchmarks.evidence")
    assert evidence.page().strip() == (evidence.HOME / "tables.md").read_text(encoding="utf-8").strip()


def test_every_error_class_is_found_with_its_messages(messages):
    from deqcore import errors

    classes = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, Exception)}
    assert classes <= set(messages)
    (template,) = [text for text in messages["UnknownNameError"].messages if "No {kind} is registered" in text]
    assert "deqcore plugins" in template
    assert any("ends" in text or "summarize" in text for text in messages["ConvergenceError"].messages)


def test_every_message_says_more_than_that_it_failed(messages):
    """A remedy cannot be tested for; that a message has a sentence and shows what was given can."""
    for kind in messages.values():
        for text in kind.messages:
            assert len(re.findall(r"\w+", text)) >= 4, f"{kind.name}: {text}"
    with pytest.raises(DeqcoreError, match=r"nowhere\.toml"):
        from deqcore import Config

        Config.load("nowhere.toml")


@pytest.mark.parametrize(("home", "name"), public(), ids=lambda each: each)
def test_the_reference_has_every_public_name(home, name):
    if name in ("__version__", "errors", "hookimpl") or home == "deqcore.errors":
        return
    shown = {f"::: {home}.{name}", f"::: {home}"} | {f"::: {home.rpartition('.')[0]}.{name}"}
    assert shown & set(REFERENCE.splitlines()), f"docs/reference has no line '::: {home}.{name}'"


@pytest.mark.parametrize("name", ["README.md", "README.ja.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_the_files_that_a_page_outside_the_site_names_are_there(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page) if "://" not in link]
    paths = re.findall(r"`((?:docs|examples|tests|benchmarks|deqcore|backends|release)/[\w./-]*)`", page)
    missing = [each for each in links + paths if not (ROOT / each).exists()]
    assert not missing, f"{name} names {missing}"


def test_the_site_and_the_citation_name_the_version_that_is_built():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"copyright: deqcore {version}, " in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
