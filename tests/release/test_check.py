"""The release check finds what is missing, and what does not belong; the builds themselves are `make release-check`."""

from __future__ import annotations

import importlib.util
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="it asks git for the files of the commit")


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("release_check", ROOT / "release" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(check, folder, *, drop=(), add=(), drop_source=(), add_source=()):
    """A wheel and an sdist of these names."""
    packages = tuple(f"{package}/" for package in check.PACKAGES)
    modules = {name.removeprefix("backends/") for name in check.tracked() if name.startswith(packages)}
    with zipfile.ZipFile(folder / "x.whl", "w") as wheel:
        for name in sorted((modules | {"deqcore-0.dist-info/METADATA"} | set(add)) - set(drop)):
            wheel.writestr(name, "")
    with tarfile.open(folder / "x.tar.gz", "w:gz") as sdist:
        for name in sorted((set(check.tracked()) | {"PKG-INFO"} | set(add_source)) - set(drop_source)):
            sdist.addfile(tarfile.TarInfo(f"deqcore-0/{name}"), io.BytesIO())
    return folder / "x.whl", folder / "x.tar.gz"


def test_a_complete_release_passes(check, tmp_path):
    check.complete(*files(check, tmp_path))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"drop": ["deqcore/solvers/broyden.py"]}, "lacks"),
        ({"drop": ["deqcore_torch/py.typed"]}, "lacks"),
        ({"add": ["tests/conftest.py"]}, "too much"),
        ({"drop_source": ["mkdocs.yml"]}, "lacks"),
        ({"add_source": ["secret.txt"]}, "no commit has"),
    ],
)
def test_a_fault_is_found(check, tmp_path, fault, words):
    with pytest.raises(check.Failure, match=words):
        check.complete(*files(check, tmp_path, **fault))


def test_the_lowest_versions_are_pins(check):
    assert "numpy==2.1" in check.oldest()
    assert any(pin.startswith("jax==") for pin in check.oldest("jax"))
    assert all("==" in pin for pin in check.oldest("jax"))


def test_the_lowest_versions_of_everything_are_those_of_every_extra_in_it(check):
    pins = check.oldest("all")
    assert len(pins) == len(set(pins))
    assert set(check.oldest("torch", "nnx", "equinox", "study", "monitor")) <= set(pins)
    assert {pin.partition("==")[0] for pin in pins} > {"torch", "jax", "flax", "equinox", "tensorboard", "jinja2"}
    assert all("==" in pin and "deqcore" not in pin for pin in pins)


def test_there_is_an_environment_of_every_kind(check):
    assert set(check.USUAL) < set(check.ENVIRONMENTS)
    assert {name.partition("-")[0] for name in check.USUAL} == {"core", "torch", "jax", "all"}


def test_an_unknown_environment_is_refused(check, capsys):
    assert check.main(["core-2.7"]) == 2
    assert "core-3.11" in capsys.readouterr().out
