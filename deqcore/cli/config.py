"""`deqcore config show`: each setting, its value and its origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deqcore import plugins
from deqcore.cli.output import AsJson, show
from deqcore.config import Config

app = typer.Typer(no_args_is_help=True, add_completion=False)

COLUMNS = ("setting", "value", "origin")


@app.callback()
def config() -> None:
    """Settings: defaults, file, environment."""


@app.command("show")
def show_config(
    path: Annotated[
        Path | None,
        typer.Option("--config", help="A TOML file. Default: deq.toml in the working directory, if there is one."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show each setting with its origin. Exits with status 2 if a name or an option is not registered."""
    found = Config.discover(path)
    rows = [
        {"setting": name, "value": value if as_json else json.dumps(value, default=str), "origin": origin}
        for name, value, origin in found.items()
    ]
    show(rows, COLUMNS, as_json=as_json)
    if found.backend != "auto":
        plugins.spec("backend", found.backend)
    plugins.make_solver(found.forward.solver, found.forward.options)
    plugins.make_strategy(found.backward.strategy, found.backward.options)
