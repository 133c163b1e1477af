"""What all conformance tests share: the backends they run on, skipping by capability, expected failures.

A class of tests names its subject by attributes, and pytest collects it like any other::

    from deqcore.testing import SolverTests

    class TestMine(SolverTests):
        solvers = ("mine",)
        expected_failures = {"test_golden[numpy-mine-slow-modes-float32]": "stalls in single precision"}

Tests ask for what a backend can do (`deqcore.types.Capabilities`), never for its name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, TypeVar

import pytest

import deqcore
from deqcore.abc.backend import Backend
from deqcore.testing import strict
from deqcore.testing.problems import golden
from deqcore.testing.runner.processes import installed
from deqcore.testing.suite.fixtures import Kit
from deqcore.testing.suite.process import FILTERS, Settings, shown

F = TypeVar("F", bound=Callable[..., Any])

DTYPES: Final = ("float64", "float32")
NEEDS: Final = "deqcore_needs"

IMPORTS: Final = (*FILTERS, "environment variables")

PLUGIN_MISSING: Final = (
    "The conformance tests need their pytest plugin: write pytest_plugins = ['deqcore.testing.plugin'] into the "
    "conftest.py of your root folder, or run pytest -p deqcore.testing.plugin."
)


def needs(capability: str) -> Callable[[F], F]:
    """Mark a test that only makes sense where a backend has this capability."""
    mark: Callable[[F], F] = getattr(pytest.mark, NEEDS)(capability)
    return mark


def several(name: str | tuple[str, ...], values: Sequence[object]) -> Callable[[F], F]:
    """`pytest.mark.parametrize`, typed."""
    mark: Callable[[F], F] = pytest.mark.parametrize(name, values)
    return mark


class Conformance:
    """Base of all suites.

    Attributes:
        backends: registered names to run on; default: the option `--deqcore-backend`, else all that are installed
            and the strict one.
        expected_failures: what is known to fail, `{test: reason}`; a key is a test's name, with or without its
            parameters in brackets. One that passes is a failure: the entry is out of date.
    """

    backends: ClassVar[tuple[str, ...]] = ()
    expected_failures: ClassVar[Mapping[str, str]] = {}

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run each test on each backend, solver and strategy that was asked for."""
        chosen = {"backend_name": self._backends, **self.subjects()}
        for fixture, names in chosen.items():
            if fixture in metafunc.fixturenames:
                metafunc.parametrize(fixture, names(metafunc.config), scope="class")

    def subjects(self) -> dict[str, Callable[[Any], Sequence[str]]]:
        """Further fixtures that hold a name, each with a function from pytest's config to the names."""
        return {}

    def required(self, request: Any) -> Sequence[str]:
        """Return the capabilities that the subject of the test needs."""
        return ()

    def _backends(self, config: Any) -> Sequence[str]:
        strict.register()
        named = self.backends or tuple(chosen(config, "backend"))
        if not named:
            return installed(())  # the strict backend is registered, so it is one of them
        return installed(named)

    @pytest.fixture
    def kit(self, request: Any, backend_name: str) -> Kit:
        """The backend under test and its device, with helpers."""
        if not request.config.pluginmanager.hasplugin("deqcore.testing.plugin"):
            raise pytest.UsageError(PLUGIN_MISSING)
        strict.register()
        return Kit(deqcore.get_backend(backend=backend_name), chosen(request.config, "device") or "cpu")

    @pytest.fixture(autouse=True)
    def _checking(self, request: Any, kit: Kit) -> Iterator[None]:
        """Full precision, and no test for what the backend cannot do. Settings that a test changes are restored."""
        settings = Settings.read(kit.backend)
        with kit.backend.harness.high_precision():
            for mark in request.node.iter_markers(NEEDS):
                skip_without(kit.backend, mark.args[0])
            for capability in self.required(request):
                skip_without(kit.backend, capability)
            if "dtype" in request.fixturenames:
                skip_without_dtype(kit.backend, request.getfixturevalue("dtype"))
            yield
        settings.restore()


class ProcessTests(Conformance):
    """What a subject does beside its result. A suite has a fixture `call`, a function that uses its subject once."""

    def test_settings_of_the_process_are_left_alone(self, kit: Kit, call: Callable[[], object]) -> None:
        """Compare settings of Python, NumPy and the framework. Leave out what the first call may import."""
        changed: dict[str, None] = {}
        streams = sys.stdout, sys.stderr  # pytest sets these between the parts of a test
        for first in (True, False):
            settings = Settings.read(kit.backend)
            call()
            if (sys.stdout, sys.stderr) != streams:
                changed["sys.stdout or sys.stderr"] = None
                sys.stdout, sys.stderr = streams
            changed |= dict.fromkeys(name for name in settings.restore() if not (first and name in IMPORTS))
        assert not changed, f"it changed {', '.join(changed)}, and did not change it back"

    def test_it_prints_and_plots_nothing(self, call: Callable[[], object], capfd: Any) -> None:
        call()
        result = shown(capfd)
        assert not result, result


def claimed(config: Any, own: Mapping[str, int] | None, subject: Any, settings: Mapping[str, object]) -> Any:
    """Return the cost bounds of a solver or strategy: from the test class, `--deqcore-cost-bounds`, or the subject.

    The bounds of the subject hold for its default options only.
    """
    given = chosen(config, "cost_bounds")
    if own is not None or given:
        cost_bounds = {**(own or {}), **(json.loads(given) if given else {})}
    else:
        cost_bounds = {} if settings else subject.cost_bounds
    for name in cost_bounds:
        golden(name)  # an unknown one would be checked nowhere
    return cost_bounds


def chosen(config: Any, what: str) -> Any:
    """Return the value of an option `--deqcore-…`, or () if the plugin is not loaded."""
    return config.getoption(f"deqcore_{what}", default=None) or ()


def skip_without(backend: Backend, capability: str) -> None:
    """Skip where the backend does not promise something."""
    if not getattr(backend.capabilities, capability):
        pytest.skip(f"{backend.name} does not promise {capability}")


def skip_without_dtype(backend: Backend, dtype: str) -> None:
    """Skip where the backend has no such dtype; float32 is what every backend has."""
    if dtype in ("float64", "bfloat16"):
        skip_without(backend, dtype)
