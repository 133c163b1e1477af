"""`deqcore check`: check gradients, backends, solvers, strategies and layers. Exits with status 1 if a check fails."""

from __future__ import annotations

import json
import time
from typing import Annotated, Final

import typer

from deqcore.cli import conformance, layer
from deqcore.cli.output import AsJson, progress_printer
from deqcore.config import Config
from deqcore.errors import ConfigError, did_you_mean, listing

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
for item in (conformance.backend, conformance.solver, conformance.strategy, layer.layer):
    app.command()(item)

DTYPES: Final = ("float64", "float32")


@app.callback()
def check() -> None:
    """Check gradients, backends, solvers, strategies and layers."""


@app.command()
def gradients(
    backend: Annotated[
        list[str] | None, typer.Option(help="Only this backend; may be repeated. Default: all installed.")
    ] = None,
    solver: Annotated[list[str] | None, typer.Option(help="Only this solver; may be repeated.")] = None,
    strategy: Annotated[list[str] | None, typer.Option(help="Only this strategy; may be repeated.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float64 or float32; may be repeated.")] = None,
    problem: Annotated[
        str | None,
        typer.Option(help="Your own problem, path/to/file.py:name: a deqcore.testing.Problem."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare solutions and gradients with stored reference values and across frameworks.

    Every backend × solver × strategy runs on golden problems. Exact strategies must agree with the reference
    within a bound from tolerance, dtype and condition. Approximate strategies must agree between frameworks after the
    same number of steps. Each framework runs in its own process.
    """
    from deqcore.testing.gradients import render, user_problems
    from deqcore.testing.gradients import sweep as golden

    Config.discover()
    start = time.perf_counter()
    dtypes = _dtypes(dtype or [])
    chosen = (backend or (), solver or (), strategy or (), dtypes)
    tell = progress_printer(as_json)
    report = (
        golden.check(*chosen, tell) if problem is None else user_problems.check_user_problem(problem, *chosen, tell)
    )
    seconds = time.perf_counter() - start
    if as_json:
        typer.echo(json.dumps(render.as_json(report, seconds), indent=2))
    else:
        show = render.matrix if problem is None else render.leaves
        render.console().print(show(report, seconds))
    if not report.ok:
        raise typer.Exit(1)


def _dtypes(named: list[str]) -> tuple[str, ...]:
    for name in named:
        if name not in DTYPES:
            raise ConfigError(f"--dtype {name!r}.{did_you_mean(name, DTYPES)} Available: {listing(DTYPES)}.")
    return tuple(dict.fromkeys(named)) or DTYPES
