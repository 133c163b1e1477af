"""The suite finds wrong answers with a good status in plugins that deqcore has never seen, each by its check."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FILES = ("faulty_plugins.py", "external_adapters.py")
CONFTEST = """
import faulty_plugins
pytest_plugins = ["deqcore.testing.plugin"]
faulty_plugins.register()
"""
CLASSES = """
import pytest
from deqcore.testing import BackendTests, SolverTests, StrategyTests
from deqcore.testing.suite.external.tests import ExternalSolverTests

class TestTheirBackends(BackendTests):
    backends = ("met-by-growth", "block-diagonal", "value-of-f", "sums-of-squares", "old-vectors")

class TestTheirSolvers(SolverTests):
    solvers, backends = ("shared", "ridge"), ("numpy",)

class TestTheirAdapters(ExternalSolverTests):
    solvers, backends = ("runs-away",), ("numpy",)

class TestTheirStrategies(StrategyTests):
    strategies, backends = ("row-by-row",), ("numpy",)

class TestTheirSteps(StrategyTests):
    strategies, backends = ("frozen",), ("torch",)
"""
SCALE = "test_steps_do_not_depend_on_scale"
# plugin: the check that must fail, and what its message must say
FAULTS = {
    "met-by-growth": ("test_a_verdict_is_not_met_by_growth", "CONVERGED by growth"),
    "block-diagonal": ("test_products_of_a_function_that_couples_rows", "where f couples rows"),
    "value-of-f": ("test_the_value_is_the_iterate_that_is_reported", "the residual of the value"),
    "sums-of-squares": ("test_norms_of_any_scale", "norms over true ones"),
    "old-vectors": ("test_some_samples_continue_with_a_later_history", "dot"),
    "shared": ("test_a_sample_is_solved_in_a_batch_as_alone", "sample 0"),
    "ridge": (SCALE, "iterates in other units"),
    "runs-away": ("test_success_is_not_claimed_without_a_solution", "success"),
    "row-by-row": ("test_coupled_rows_are_not_a_solution", "CONVERGED, but"),
    "frozen": ("test_a_derivative_is_not_frozen_with_its_value", "frozen derivative"),
}


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    """The messages of failed checks, by their names with parameters: one run, of each plugin's own check."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("theirs")
    for name in FILES:
        shutil.copy(Path(__file__).with_name(name), folder / name)
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_theirs.py").write_text(CLASSES)
    pairs = [(plugin, check) for plugin, (check, _) in FAULTS.items()]
    chosen = " or ".join(f"({plugin} and {check})" for plugin, check in [*pairs, ("shared", SCALE)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=found.xml", "-k", chosen]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    cases = ET.parse(folder / "found.xml").getroot().iter("testcase")
    return {
        case.get("name", ""): failed.get("message", "")
        for case in cases
        if (failed := case.find("failure")) is not None
    }


@pytest.mark.parametrize("plugin", FAULTS)
def test_the_fault_of_a_third_party_is_named(failures, plugin):
    check, words = FAULTS[plugin]
    found = {name: message for name, message in failures.items() if f"{plugin}-" in name or f"{plugin}]" in name}
    own = [message for name, message in found.items() if name.partition("[")[0] == check]
    assert own, f"{check} passes. Failed: {sorted(found)}"
    assert any(words in message for message in own), own


def test_no_other_plugin_fails_the_check_of_a_solver(failures):
    """A check that fails everything would find every fault."""
    solvers = ("shared", "ridge")
    failed = {name for name in failures if name.startswith(SCALE)}
    assert {plugin for plugin in solvers if any(plugin in name for name in failed)} == {"ridge"}
