"""`deqcore check backend|solver|strategy`: the suite in one process per backend, and its outcomes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from deqcore import get_backend, plugins
from deqcore.errors import BackendError, ConfigError, MissingExtraError
from deqcore.testing import strict
from deqcore.testing.runner.processes import environment, installed

SubjectKind = Literal["backend", "solver", "strategy"]

NO_TESTS: Final = 5  # pytest's exit code
USAGE: Final = 4


@dataclass(frozen=True)
class CaseOutcome:
    """One test.

    Attributes:
        test: its name, with parameters in brackets.
        backend: that it ran on.
        outcome: "passed", "failed", "skipped" or "expected" (it failed as `expected_failures` says).
        message: why it failed or was skipped, in one line.
        detail: the whole report of a failure.
        seconds: that it took.
    """

    test: str
    backend: str
    outcome: Literal["passed", "failed", "skipped", "expected"]
    message: str
    detail: str
    seconds: float

    @property
    def check(self) -> str:
        """The test's name without parameters."""
        return self.test.partition("[")[0]


@dataclass(frozen=True)
class SuiteRequest:
    """What to check.

    Attributes:
        kind: of the thing under test.
        name: its registered name.
        backends: to run on; empty for all that are installed and the strict one.
        device: of the arrays.
        options: of the solver or strategy, as JSON.
        cost_bounds: golden problems that it solves with these options, each with its largest cost, as JSON.
        expect: a TOML file of expected failures.
        select: only tests that match, as pytest's `-k`.
        first: stop at the first failure.
    """

    kind: SubjectKind
    name: str
    backends: tuple[str, ...] = ()
    device: str | None = None
    options: str | None = None
    cost_bounds: str | None = None
    expect: Path | None = None
    select: str | None = None
    first: bool = False


def check(request: SuiteRequest, tell: Callable[[str], None] = lambda _: None) -> list[CaseOutcome]:
    """Run the suite.

    Args:
        request: what to check.
        tell: called with lines about progress.

    Raises:
        UnknownNameError: a name is not registered; this is checked before any test runs.
        MissingExtraError: pytest is not installed.
        BackendError: pytest could not run; the message is its own.
    """
    if not plugins.is_installed("pytest"):
        raise MissingExtraError.of("`deqcore check`", "pytest", "test")
    plugins.load(request.kind, request.name)
    if request.device is not None:
        _check_device(request)
    results: list[CaseOutcome] = []
    for backend in backends_of(request):
        tell(f"{request.kind} {request.name} on {backend} …")
        results += _run(request, backend)
    return results


def backends_of(request: SuiteRequest) -> tuple[str, ...]:
    """Return a backend is checked on itself, everything else on all that are installed, the strict one first."""
    if request.kind == "backend":
        strict.register()
        return installed((request.name,))
    if request.backends:
        strict.register()
        return installed(request.backends)
    return (strict.NAME, *(name for name in installed(()) if name != strict.NAME))


def arguments(request: SuiteRequest, backend: str, results: Path) -> list[str]:
    """Return pytest's command line, which ignores all configuration files, a conftest.py here included."""
    config = results.parent / "pytest.ini"
    config.write_text("[pytest]\n")
    given = {
        "backend": backend,
        request.kind: request.name,
        "device": request.device,
        "options": request.options,
        "cost_bounds": request.cost_bounds,
        "expect": request.expect and request.expect.resolve(),
        "results": results,
    }
    args = ["-q", "-c", str(config), "--noconftest", "-p", "no:cacheprovider", "-p", "deqcore.testing.plugin"]
    args += [f"--deqcore-{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None]
    args += ["-k", request.select] if request.select else []
    args += ["-x"] if request.first else []
    return [*args, "--deqcore-project", "--pyargs", f"deqcore.testing.suite.test_{request.kind}"]


def _check_device(request: SuiteRequest) -> None:
    """Raise one clear error instead of one per test."""
    for name in backends_of(request):
        backend = get_backend(backend=name)
        backend.to_device(backend.asarray([0.0]), str(request.device))


def _run(request: SuiteRequest, backend: str) -> list[CaseOutcome]:
    with tempfile.TemporaryDirectory(prefix="deqcore-check-") as folder:
        results = Path(folder) / "results.json"
        env = {**environment("float64"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments(request, backend, results)],
            env=_kept(env),
            capture_output=True,
            text=True,
            check=False,
        )
        if not results.exists() or done.returncode in (USAGE, NO_TESTS):
            lines = [line for line in (done.stdout + done.stderr).strip().splitlines() if line.strip()]
            if done.returncode == NO_TESTS:
                raise ConfigError(f"No test matches {request.select!r}: see the names in `deqcore check … --json`.")
            raise BackendError(f"The suite could not run on {backend}: {lines[-1] if lines else 'no message'}")
        return [CaseOutcome(**load, backend=backend) for load in json.loads(results.read_text())]


def _kept(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without settings: the suite has its own."""
    names = ("DEQCORE_FORWARD", "DEQCORE_BACKWARD", "DEQCORE_BACKEND")
    kept = {name: value for name, value in env.items() if not name.startswith(names)}
    return kept | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}


def ok(outcomes: Sequence[CaseOutcome]) -> bool:
    """Return whether nothing failed and something ran."""
    ran = [outcome for outcome in outcomes if outcome.outcome != "skipped"]
    return bool(ran) and all(item.outcome != "failed" for item in ran)
