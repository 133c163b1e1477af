"""The example of a solver plugin: one file, two ways to register it, every backend."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize

import deqcore
from deqcore import Config, errors, plugins
from deqcore.plugins.builtin import BACKENDS

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_solver"
INSTALLED = [spec.name for spec in BACKENDS if spec.package is None or plugins.is_installed(spec.package)]


@pytest.fixture(autouse=True)
def _fresh(no_settings: None, no_plugins: None) -> Iterator[None]:
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in {"aitken", "deq_aitken"}]:
        del sys.modules[name]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("custom_solver_run", EXAMPLE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(site: Path) -> None:
    """Lay out the package as its wheel would be, from what its pyproject.toml declares."""
    project = tomllib.loads((EXAMPLE / "package" / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in wheel["packages"]:
        shutil.copytree(EXAMPLE / "package" / package, site / package)
    for source, target in wheel["force-include"].items():
        shutil.copy(EXAMPLE / "package" / source, site / target)
    info = site / "deq_aitken-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['project']['name']}\nVersion: 0.1.0\n")
    points = project["project"]["entry-points"]["deqcore"]
    (info / "entry_points.txt").write_text("[deqcore]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))


@pytest.mark.parametrize("name", INSTALLED)
def test_the_script_runs_on_every_backend(name: str) -> None:
    run = script()
    found = run.main(name)
    _, z0, (w, x) = run.problem(deqcore.get_backend(backend="numpy"))
    truth = scipy.optimize.fsolve(lambda z: (np.tanh(z.reshape(z0.shape) @ w + x) - z.reshape(z0.shape)).ravel(), z0)
    for result in found.values():
        assert result["converged"]
        np.testing.assert_allclose(result["z"], truth.reshape(z0.shape), atol=1e-4)
    assert max(found["aitken"]["steps"]) < min(found["picard"]["steps"])


@pytest.mark.parametrize("name", INSTALLED)
def test_gradients_go_through_it(name: str) -> None:
    config = Config.load(EXAMPLE / "deq.toml")
    backend = deqcore.get_backend(config, backend=name)
    z0, x, g = (backend.asarray(np.full((2, 3), value, dtype="float32")) for value in (0.0, 1.0, 1.0))
    z, (dx,) = deqcore.vjp(lambda z, x: 0.75 * z + x, z0, x, cotangent=g, config=config, backend=name)
    np.testing.assert_allclose(backend.to_numpy(z), 4.0, rtol=1e-4)  # x / (1 − 0.75)
    np.testing.assert_allclose(backend.to_numpy(dx), 4.0, rtol=1e-4)


def test_one_step_of_aitken_solves_an_affine_map_with_one_mode() -> None:
    Config.load(EXAMPLE / "deq.toml")
    f = lambda z: -0.5 * z + 3.0
    sol = deqcore.fixed_point(f, np.zeros((1, 4)), forward__solver="aitken", forward__rtol=1e-12)
    assert sol.steps.tolist() == [2]  # one to learn the damping, one to use it
    np.testing.assert_allclose(sol.value, 2.0, rtol=1e-12)


def test_its_options_are_checked() -> None:
    config = Config.load(EXAMPLE / "deq.toml")
    assert repr(plugins.make_solver("aitken", config.forward.options)) == "Aitken(first=1.0, largest=5.0)"
    with pytest.raises(errors.ConfigError, match=r"no option 'larges'. Did you mean 'largest'"):
        plugins.make_solver("aitken", {"larges": 1.0})
    with pytest.raises(errors.ConfigError, match="refuses its options: first must be a number above 0"):
        plugins.make_solver("aitken", {"first": 0})


def test_the_package_registers_it_by_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (status,) = plugins.plugins_status()
    assert (status.name, status.version, status.status) == ("aitken", "0.1.0", "ok")
    assert type(plugins.make_solver("aitken")).__module__ == "deq_aitken.solver"
    sol = deqcore.fixed_point(np.cos, np.ones((1, 1)), forward__solver="aitken", forward__rtol=1e-10)
    assert float(sol.value[0, 0]) == pytest.approx(0.7390851332151607)  # the Dottie number


def test_both_ways_at_once_are_a_conflict_that_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Config.load(EXAMPLE / "deq.toml")
    with pytest.raises(errors.PluginError, match=r"(?s)Two plugins offer the solver 'aitken': .*deqfile.*deq_aitken"):
        plugins.make_solver("aitken")
