"""`deqcore config show`: each setting, its value and its origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deqcore import plugins
from deqcore.cli.output import AsJson, show
from deqcore.config import Config

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

COLUMNS = ("setting", "value", "origin")


@app.callback()
def config() -> None:
    """Show settings: defaults, file, environment."""


@app.command("show")
def show_config(
    path: Annotated[
        Path | None,
        typer.Option("--config", help="A TOML file. Default: deq.toml in the working directory, if there is one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show each setting with its origin. Exits with status 2 if a name or an option is not registered."""
    result = Config.discover(path)
    rows = [
        {"setting": name, "value": value if as_json else json.dumps(value, default=str), "origin": origin}
        for name, value, origin in result.items()
    ]
    show(rows, COLUMNS, as_json=as_json)
    if result.backend != "auto":
        plugins.spec("backend", result.backend)
    plugins.make_solver(result.forward.solver, result.forward.options)
    plugins.make_strategy(result.backward.strategy, result.backward.options)
