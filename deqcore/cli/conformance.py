"""`deqcore check backend|solver|strategy NAME`: the conformance suite as commands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.console import Console

from deqcore.cli.output import AsJson
from deqcore.config import Config
from deqcore.errors import ConfigError

if TYPE_CHECKING:
    from deqcore.testing.runner.conformance import SuiteRequest

Name: TypeAlias = Annotated[str, typer.Argument(help="Its registered name.")]
Backends: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--backend", help="Run on this backend only; may be repeated. Default: strict and all installed."),
]
Device: TypeAlias = Annotated[str | None, typer.Option(help="Where the arrays are, such as cuda. Default: the host.")]
OptionsText: TypeAlias = Annotated[str | None, typer.Option("--options", help="Its options, as a JSON object.")]
ClaimsText: TypeAlias = Annotated[
    str | None,
    typer.Option("--cost-bounds", help="Golden problems that it solves with these options, and at what cost, as JSON."),
]
Expect: TypeAlias = Annotated[
    Path | None, typer.Option(help="TOML file of expected failures, test = 'reason'; one that passes is a failure.")
]
Junit: TypeAlias = Annotated[Path | None, typer.Option(help="Write JUnit's XML to this file.")]
Select: TypeAlias = Annotated[str | None, typer.Option("--select", "-k", help="Only tests whose names match.")]


def backend(
    name: Name,
    device: Device = None,
    expect: Expect = None,
    junit: Junit = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Check a backend: arrays, histories, loops, derivatives, gradients against stored truths."""
    from deqcore.testing.runner.conformance import SuiteRequest

    report(SuiteRequest("backend", name, (), device, expect=expect, select=select), junit, as_json)


def solver(
    name: Name,
    on: Backends = None,
    device: Device = None,
    options: OptionsText = None,
    cost_bounds: ClaimsText = None,
    expect: Expect = None,
    junit: Junit = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Check a solver: honest statuses everywhere, and convergence where plain iteration converges or it cost_bounds it."""
    from deqcore.testing.runner.conformance import SuiteRequest

    given = checked(options), checked(cost_bounds, "--cost-bounds", '{"slow-modes": 60}')
    report(SuiteRequest("solver", name, tuple(on or ()), device, *given, expect, select), junit, as_json)


def strategy(
    name: Name,
    on: Backends = None,
    device: Device = None,
    options: OptionsText = None,
    cost_bounds: ClaimsText = None,
    expect: Expect = None,
    junit: Junit = None,
    select: Select = None,
    as_json: AsJson = False,
) -> None:
    """Check a backward strategy: against closed forms, stored truths and its own report."""
    from deqcore.testing.runner.conformance import SuiteRequest

    given = checked(options), checked(cost_bounds, "--cost-bounds", '{"slow-modes": 60}')
    report(SuiteRequest("strategy", name, tuple(on or ()), device, *given, expect, select), junit, as_json)


def checked(text: str | None, option: str = "--options", example: str = '{"history_size": 5}') -> str | None:
    """Text that is a JSON object."""
    try:
        if text is None or isinstance(json.loads(text), dict):
            return text
    except ValueError:
        pass
    raise ConfigError(f"{option} {text!r}, but a JSON object is expected, such as '{example}'.")


def report(request: SuiteRequest, junit: Path | None, as_json: bool) -> None:
    """Run, print, and exit with 1 if a test failed."""
    from deqcore.testing.gradients.render import console
    from deqcore.testing.runner import conformance, render

    Config.discover()
    if junit is not None and not junit.parent.is_dir():
        raise ConfigError(f"--junit {str(junit)!r}: there is no folder {str(junit.parent)!r}.")
    if junit is not None and junit.is_dir():
        raise ConfigError(f"--junit {str(junit)!r} is a directory, but the name of a file to write is expected.")
    if request.expect is not None and not request.expect.is_file():
        found = "is a directory, but a TOML file is expected" if request.expect.is_dir() else "there is no such file"
        raise ConfigError(f"--expect {str(request.expect)!r}: {found}.")
    start = time.perf_counter()
    outcomes = conformance.check(request, teller(as_json))
    seconds = time.perf_counter() - start
    if junit is not None:
        junit.write_text(render.junit(request, outcomes), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(render.as_json(request, outcomes, seconds), indent=2))
    else:
        console().print(render.table(request, outcomes, seconds))
    if not conformance.ok(outcomes):
        raise typer.Exit(1)


def teller(quiet: bool) -> Callable[[str], None]:
    """Progress for people, on stderr and only on a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return lambda _: None
    return lambda line: console.print(line, style="dim")
