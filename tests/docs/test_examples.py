"""The examples in docstrings do what they show."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = [ROOT / "deqcore", *sorted((ROOT / "backends").glob("deqcore_*"))]
NEEDS = {"torch": "torch", "jax": "jax", "nnx": "flax", "equinox": "equinox"}
FLAGS = doctest.NORMALIZE_WHITESPACE


def examples():
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            if ">>> " in path.read_text(encoding="utf-8"):
                yield ".".join(path.relative_to(package.parent).with_suffix("").parts)


@pytest.mark.parametrize("name", list(examples()))
@pytest.mark.usefixtures("no_plugins")
def test_examples_of_a_module_run(name, tmp_path, monkeypatch):
    for part in (name.partition(".")[0].removeprefix("deqcore_"), name.rpartition(".")[2]):
        if part in NEEDS:
            pytest.importorskip(NEEDS[part])
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=FLAGS)
    assert found.attempted > 0, f"{name} has an example that doctest does not see"
    assert not found.failed, f"{found.failed} of {found.attempted} examples failed; see above"


def test_a_wrong_example_is_found():
    def wrong():
        """Give 2.

        >>> 1 + 1
        3
        """

    (case,) = doctest.DocTestFinder().find(wrong, "wrong", globs={})
    assert doctest.DocTestRunner(verbose=False).run(case, out=lambda _: None).failed == 1
