"""`deqcore check backend|solver|strategy NAME`: the conformance suite as commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from deqcore.cli.output import AsJson, progress_printer
from deqcore.config import Config
from deqcore.errors import ConfigError

if TYPE_CHECKING:
    from deqcore.testing.runner.conformance import SubjectKind, SuiteRequest

Name: TypeAlias = Annotated[str, typer.Argument(help="The registered name.")]
Backends: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--backend", help="Run on this backend only; may be repeated. Default: strict and all installed."),
]
Device: TypeAlias = Annotated[str | None, typer.Option(help="Device of the arrays, such as cuda. Default: the host.")]
OptionsText: TypeAlias = Annotated[str | None, typer.Option("--options", help="Its options, as a JSON object.")]
CostBounds: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--cost-bounds", help="Golden problems that it solves with these options, each with its largest cost, as JSON."
    ),
]
Expect: TypeAlias = Annotated[
    Path | None, typer.Option(help="TOML file of expected failures, test = 'reason'. One that passes is a failure.")
]
Junit: TypeAlias = Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")]
Report: TypeAlias = Annotated[Path | None, typer.Option(help="Write a report card, one HTML page, to this file.")]
Limit: TypeAlias = Annotated[
    float, typer.Option(help="Seconds that one test may take; then it has failed and its process is ended.")
]
SearchPath: TypeAlias = Annotated[
    list[Path] | None,
    typer.Option("--path", help="Folder of code that is not installed, such as a checkout; may be repeated."),
]
Select: TypeAlias = Annotated[str | None, typer.Option("--select", "-k", help="Only tests whose names match.")]


def backend(
    name: Name,
    device: Device = None,
    expect: Expect = None,
    junit: Junit = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Check a backend: arrays, histories, loops, derivatives, and gradients against stored reference values."""
    from deqcore.testing.runner.conformance import SuiteRequest

    run(SuiteRequest("backend", name, device=device, expect=expect, select=select), junit, as_json)


def of_method(kind: SubjectKind, about: str) -> Callable[..., None]:
    """Return the command that checks a solver or a strategy."""

    def command(
        name: Name,
        on: Backends = None,
        device: Device = None,
        options: OptionsText = None,
        cost_bounds: CostBounds = None,
        expect: Expect = None,
        junit: Junit = None,
        select: Select = None,
        report: Report = None,
        limit: Limit = 300.0,
        path: SearchPath = None,
        as_json: AsJson = False,
    ) -> None:
        from deqcore.testing.runner.conformance import SuiteRequest

        check_json("--options", options, '{"history_size": 5}')
        check_json("--cost-bounds", cost_bounds, '{"slow-modes": 60}')
        search(path or ())
        backends, paths = tuple(on or ()), tuple(path or ())
        asked = SuiteRequest(
            kind, name, backends, device, options, cost_bounds, expect, select, limit=limit, paths=paths
        )
        run(asked, junit, as_json, report)

    command.__name__, command.__doc__ = kind, about
    return command


solver = of_method(
    "solver", "Check a solver: correct statuses, convergence where Picard iteration converges, and its cost bounds."
)
strategy = of_method(
    "strategy", "Check a backward strategy against closed forms, stored reference values and its own report."
)


def search(folders: Sequence[Path]) -> None:
    """Put folders of code that is not installed in front of where Python looks for modules, here and in the suite."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"--path must be an existing folder (got {str(folder)!r}).")
        sys.path.insert(0, str(folder.resolve()))


def run(request: SuiteRequest, junit: Path | None, as_json: bool, report: Path | None = None) -> None:
    """Run the suite, print its outcomes, and exit with status 1 if a test failed."""
    from deqcore.testing.gradients.render import console
    from deqcore.testing.runner import card, conformance, render

    Config.discover()
    check_paths(junit, request.expect, report)
    if not request.limit > 0:
        raise ConfigError(f"--limit must be a number of seconds > 0 (got {request.limit:g}).")
    start = time.perf_counter()
    outcomes = conformance.check(request, progress_printer(as_json))
    seconds = time.perf_counter() - start
    if junit is not None:
        junit.write_text(render.junit(request, outcomes), encoding="utf-8")
    if report is not None:
        report.write_text(card.page(request, outcomes, seconds), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(render.as_json(request, outcomes, seconds), indent=2))
    else:
        console().print(render.table(request, outcomes, seconds))
    if not conformance.ok(outcomes):
        raise typer.Exit(1)


def check_json(option: str, text: str | None, example: str) -> None:
    """Raise a ConfigError unless the text is a JSON object."""
    try:
        if text is None or isinstance(json.loads(text), dict):
            return
    except ValueError:
        pass
    raise ConfigError(f"{option} must be a JSON object, such as '{example}' (got {text!r}).")


def check_paths(junit: Path | None, expect: Path | None, report: Path | None = None) -> None:
    """Raise a ConfigError unless `junit` and `report` can be written and `expect` is a file."""
    for option, path in (("--junit", junit), ("--report", report)):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{option} must be in an existing folder (got {str(path)!r}).")
        if path is not None and path.is_dir():
            raise ConfigError(f"{option} must be the name of a file to write (got the directory {str(path)!r}).")
    if expect is not None and expect.is_dir():
        raise ConfigError(f"--expect must be a TOML file (got the directory {str(expect)!r}).")
    if expect is not None and not expect.is_file():
        raise ConfigError(f"--expect must be an existing file (got {str(expect)!r}).")
