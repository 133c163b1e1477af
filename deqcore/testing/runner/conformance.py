"""`deqcore check backend|solver|strategy`: the suite in one process per backend, and its outcomes."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from deqcore import get_backend, plugins
from deqcore.abc.external import ExternalSolver
from deqcore.errors import BackendError, ConfigError, MissingExtraError
from deqcore.testing import strict
from deqcore.testing.runner import isolation
from deqcore.testing.runner.processes import environment, installed

SubjectKind = Literal["backend", "solver", "strategy"]

NO_TESTS: Final = 5  # pytest's exit code
USAGE: Final = 4
LIMIT: Final = 300.0
BEST: Final = "best settings"


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
        notes: what the test noted for a report, such as its "code" in a few lines.
    """

    test: str
    backend: str
    outcome: Literal["passed", "failed", "skipped", "expected"]
    message: str
    detail: str
    seconds: float
    notes: Mapping[str, object] = field(default_factory=dict)

    @property
    def not_run(self) -> bool:
        """Whether it counts as failed only because tests before it hung or ended the process."""
        return self.outcome == "failed" and self.message.startswith(isolation.NOT_RUN)

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
        limit: seconds that one test may take.
        paths: folders of code that is not installed, which a report's commands name.
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
    limit: float = LIMIT
    paths: tuple[Path, ...] = ()

    @property
    def external(self) -> type[ExternalSolver] | None:
        """The adapter of another library's solver, if the subject is one."""
        cls: object = plugins.load(self.kind, self.name) if self.kind == "solver" else None
        return cls if isinstance(cls, type) and issubclass(cls, ExternalSolver) else None


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
        raise MissingExtraError.of("`deqcore check`", "pytest", None)
    plugins.load(request.kind, request.name)
    if request.device is not None:
        _check_device(request)
    results: list[CaseOutcome] = []
    for backend in backends_of(request):
        tell(f"{request.kind} {request.name} on {backend} …")
        results += _run(request, backend)
    best = getattr(request.external, "best", {})
    if best and request.options is None:
        tell(f"{request.kind} {request.name}, {BEST} …")
        chosen = replace(request, options=json.dumps(dict(best)))
        (backend,) = backends_of(request)
        results += [replace(outcome, backend=f"{backend}, {BEST}") for outcome in _run(chosen, backend)]
    return results


def backends_of(request: SuiteRequest) -> tuple[str, ...]:
    """Return a backend is checked on itself, everything else on all that are installed, the strict one first."""
    if request.kind == "backend":
        strict.register()
        return installed((request.name,))
    if request.external is not None:
        return _own_backend(request, request.external.backend)
    if request.backends:
        strict.register()
        return installed(request.backends)
    return (strict.NAME, *(name for name in installed(()) if name != strict.NAME))


def _own_backend(request: SuiteRequest, own: str) -> tuple[str, ...]:
    """Return the backend of an adapter, which takes arrays of one framework only."""
    if set(request.backends) - {own}:
        raise ConfigError(f"--backend must be {own!r}: {request.name} takes its arrays (got {list(request.backends)}).")
    return installed((own,))


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
    suite = "external" if request.external is not None else request.kind
    return [*args, "--deqcore-project", "--pyargs", f"deqcore.testing.suite.test_{suite}"]


def _check_device(request: SuiteRequest) -> None:
    """Raise one clear error instead of one per test."""
    for name in backends_of(request):
        backend = get_backend(backend=name)
        backend.to_device(backend.asarray([0.0]), str(request.device))


def _run(request: SuiteRequest, backend: str) -> list[CaseOutcome]:
    with tempfile.TemporaryDirectory(prefix="deqcore-check-") as folder:
        results = Path(folder) / "results.jsonl"
        env = {
            **environment("float64"),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTEST_ADDOPTS": "",
            "MPLBACKEND": "Agg",
        }
        ended = isolation.run(arguments(request, backend, results), _kept(env), results, request.limit)
        if ended.entries is None or ended.returncode in (USAGE, NO_TESTS):
            lines = [line for line in ended.output.strip().splitlines() if line.strip()]
            if ended.returncode == NO_TESTS and not ended.entries:
                raise ConfigError(f"No test matches {request.select!r}: see the names in `deqcore check … --json`.")
            if ended.returncode != NO_TESTS:
                raise BackendError(f"The suite could not run on {backend}: {lines[-1] if lines else 'no message'}")
        return [CaseOutcome(**load, backend=backend) for load in ended.entries or ()]


def _kept(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without settings: the suite has its own."""
    names = ("DEQCORE_FORWARD", "DEQCORE_BACKWARD", "DEQCORE_BACKEND")
    kept = {name: value for name, value in env.items() if not name.startswith(names)}
    return kept | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}


def ok(outcomes: Sequence[CaseOutcome]) -> bool:
    """Return whether nothing failed and something ran."""
    ran = [outcome for outcome in outcomes if outcome.outcome != "skipped"]
    return bool(ran) and all(item.outcome != "failed" for item in ran)
