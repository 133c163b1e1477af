"""Data and models of a study that come from plugins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deqcore import plugins
from deqcore.errors import ConfigError, PluginError, UnknownNameError
from deqcore.plugins import DataSpec, ModelSpec
from deqcore.study import data
from deqcore.study.grid import UserCode, cells
from deqcore.study.models import find
from deqcore.study.settings import DataChoice, read

DEQFILE = """
import numpy as np
from deqcore.plugins import DataSpec, ModelSpec, hookimpl


@hookimpl
def deqcore_data():
    yield DataSpec("stripes", "stripes:load", "which way do they run", gives="image")


@hookimpl
def deqcore_models():
    yield ModelSpec("half", "stripes:Half")
"""
CODE = """
import numpy as np
from deqcore.study.data import Dataset, Split
from deqcore.study.models import Dense


def load(choice):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 64)
    bars = np.where(np.arange(4) % 2, 1.0, -1.0) * np.ones((4, 1))
    x = np.where(y[:, None, None], bars, bars.T)[:, None] + 0.1 * rng.standard_normal((64, 1, 4, 4))
    part = Split(x.astype(np.float32), y)
    return Dataset(choice.label, "image", ("across", "down"), part, part, part)


class Half(Dense):
    def cell(self, ops, p, z, injected):
        return 0.5 * super().cell(ops, p, z, injected)
"""
CONFIG = """
backend = "torch"
[plugins]
deqfile = true
[study]
name = "stripes"
data = ["stripes"]
models = [{ name = "half", width = 8 }]
strategies = ["jacobian-free"]
[study.training]
epochs = 4
batch = 16
audits = 0
rate = 2e-2
"""


pytestmark = pytest.mark.usefixtures("no_plugins")


def test_a_config_names_data_and_a_model_of_a_plugin(tmp_path: Path):
    pytest.importorskip("torch")
    for name, text in (("deqfile.py", DEQFILE), ("stripes.py", CODE), ("deq.toml", CONFIG)):
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "deqcore.cli.app", "study", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (cell,) = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert cell["status"] == "ok", cell
    assert cell["cell"]["data"]["label"] == "stripes"
    assert cell["test_accuracy"] == 1.0
    assert cell["parameters"] == 8 * 8 + 16 * 8 + 8 + 8 * 2 + 2


def test_what_data_gives_decides_which_models_meet_it():
    plugins.register(DataSpec("words", "no_such_module:load", gives="tokens"))
    table = {"data": ["digits", "words"], "models": ["dense", "attention"], "strategies": ["exact-ift"]}
    found = cells(read(table, "x"), UserCode(), ("torch",))
    assert [(cell.data.name, cell.model.name) for cell in found] == [("digits", "dense"), ("words", "attention")]
    with pytest.raises(ConfigError, match="the data 'words' is tokens. Add an entry to models that takes it"):
        cells(read({"data": ["digits", "words"]}, "x"), UserCode(), ("torch",))


def test_names_that_are_not_registered():
    with pytest.raises(UnknownNameError, match=r"No data is registered as 'digit'. Did you mean 'digits'\?"):
        cells(read({"data": ["digit"]}, "x"), UserCode(), ("torch",))
    with pytest.raises(UnknownNameError, match=r"No model is registered as 'dens'. Did you mean 'dense'\?"):
        cells(read({"models": ["dens"]}, "x"), UserCode(), ("torch",))


def test_plugins_that_are_none():
    plugins.register(DataSpec("three", "builtins:repr"))
    with pytest.raises(PluginError, match="The data 'three' must return a deqcore.study.data.Dataset"):
        data.load(DataChoice(name="three", label="x"), None)
    plugins.register(ModelSpec("path", "pathlib:Path"))
    with pytest.raises(PluginError, match="must be a subclass of deqcore.study.models.Model"):
        find("path")
    plugins.register(ModelSpec("gone", "no_such_module:Model"))
    with pytest.raises(PluginError, match="'no_such_module:Model', which cannot be imported"):
        find("gone")
    with pytest.raises(PluginError, match=r"gives must be one of \('vector', 'image', 'tokens'\) \(got 'pictures'\)"):
        DataSpec("a", "b:c", gives="pictures")
    with pytest.raises(PluginError, match="reserved for the built-in one"):
        plugins.register(ModelSpec("dense", "a:B"))
