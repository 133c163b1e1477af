"""The pytest plugin of the conformance suite: options, markers, expected failures.

Load it with `pytest_plugins = ["deqcore.testing.plugin"]` or `pytest -p deqcore.testing.plugin`. It is not an
entry point, so that it stays out of the test sessions of people who only use deqcore.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Before the modules with the tests are imported, so that a bare assert shows what was compared.
pytest.register_assert_rewrite("deqcore.testing.suite")

from deqcore.api import get_backend  # noqa: E402
from deqcore.config import Config  # noqa: E402
from deqcore.errors import did_you_mean, listing  # noqa: E402
from deqcore.testing.runner.isolation import Journal  # noqa: E402
from deqcore.testing.suite.base import NEEDS, Conformance  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `deqcore check` and of the command line."""
    group = parser.getgroup("deqcore", "deqcore conformance suite")
    add = group.addoption
    add("--deqcore-backend", action="append", help="run on this backend only; may be repeated")
    add("--deqcore-solver", action="append", help="check this solver only; may be repeated")
    add("--deqcore-strategy", action="append", help="check this strategy only; may be repeated")
    add("--deqcore-device", help="device of the arrays, such as cuda; default cpu")
    add("--deqcore-options", help="options of the solver or strategy under test, as JSON")
    add(
        "--deqcore-cost-bounds",
        help="golden problems that it solves with these options, each with its largest cost, as JSON",
    )
    add("--deqcore-results", metavar="FILE", help="write each test's outcome to this file, a line of JSON each")
    add("--deqcore-project", action="store_true", help="load the plugins of the project in the working directory")
    add("--deqcore-expect", metavar="FILE", help="TOML file of expected failures: test = 'reason'")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker by which tests ask for capabilities."""
    config.addinivalue_line("markers", f"{NEEDS}(capability): skip where the backend does not have it")
    config.addinivalue_line("markers", "supports(feature, backends, strategies, answer): a row of the support matrix")
    if config.getoption("deqcore_project"):
        Config.discover()
    if path := config.getoption("deqcore_results"):
        config.pluginmanager.register(Results(Path(path)), "deqcore_results")


class Results:
    """Writes each test's outcome as soon as it is known, so that it outlives a test that ends the process.

    Tests that have an outcome in the file, from an earlier process, are left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = set(Journal.read(path).entries)
        self.found: dict[str, dict[str, object]] = {}

    def _write(self, event: Mapping[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(event) + "\n")

    @pytest.hookimpl(trylast=True)  # after -k
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what is done, and note the names of all tests."""
        self._write({"collected": [*self.done, *(item.name for item in items if item.name not in self.done)]})
        done = [item for item in items if item.name in self.done]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.name not in self.done]
        for name in config.getoption("deqcore_backend") or ():
            get_backend(backend=name)  # the import of a framework is not part of the first test's time

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note which test runs."""
        self._write({"running": nodeid.rpartition("::")[2]})

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """Write its outcome."""
        self._write(self.found[nodeid.rpartition("::")[2]])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take one phase of one test: setup, call or teardown."""
        name = report.nodeid.rpartition("::")[2]
        entry = self.found.setdefault(
            name, {"test": name, "outcome": "passed", "message": "", "detail": "", "seconds": 0.0, "notes": {}}
        )
        entry["notes"] = dict(report.user_properties)
        entry["seconds"] = float(str(entry["seconds"])) + report.duration
        if report.passed or entry["outcome"] == "failed":
            return
        expected = hasattr(report, "wasxfail")
        entry["outcome"] = "expected" if expected else report.outcome
        entry["message"] = report.wasxfail if expected else _reason(report)
        entry["detail"] = report.longreprtext if report.failed else ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Record a module that cannot be collected as a failure."""
        if report.failed:
            name = report.nodeid or "collection"
            self.found[name] = {
                "test": name,
                "outcome": "failed",
                "message": report.longreprtext.strip().splitlines()[-1],
                "detail": report.longreprtext,
                "seconds": 0.0,
                "notes": {},
            }
            self._write(self.found[name])


def _reason(report: pytest.TestReport) -> str:
    """Return the line with the reason."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    return str(text).strip().splitlines()[0] if str(text).strip() else "no message"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark expected failures strictly, so that the list stays true."""
    listed = _listed(config.getoption("deqcore_expect"))
    used: set[str] = set()
    for item in items:
        cls = getattr(item, "cls", None)
        if cls is None or not issubclass(cls, Conformance):
            continue
        _check_names(cls)
        expected = {**cls.expected_failures, **listed}
        bare = item.name.partition("[")[0]
        key = next((name for name in (item.name, bare) if name in expected), None)
        if key is not None:
            used.add(key)
            item.add_marker(pytest.mark.xfail(reason=expected[key], strict=True))
    tests = {item.name for item in items}
    for name in set(listed) - used:
        raise pytest.UsageError(
            f"--deqcore-expect names {name!r}, but no such test was collected." + _near(name, tests)
        )


@cache  # thousands of items share a few classes
def _check_names(cls: type[Conformance]) -> None:
    tests = {name for name in dir(cls) if name.startswith("test_")}
    for name in cls.expected_failures:
        if name.partition("[")[0] not in tests:
            raise pytest.UsageError(
                f"{cls.__name__}.expected_failures names {name!r}, but no test has this name." + _near(name, tests)
            )


def _near(name: str, tests: set[str]) -> str:
    return did_you_mean(name, tests) or f" Tests: {listing(tests)}."


def _listed(path: str | None) -> Mapping[str, str]:
    if path is None:
        return {}
    try:
        results: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise pytest.UsageError(f"--deqcore-expect {path!r} cannot be read: {error}") from error
    for name, reason in results.items():
        if not isinstance(reason, str):
            raise pytest.UsageError(
                f"--deqcore-expect {path!r}: {name} must be a text that gives the reason (got {reason!r})."
            )
    return results
