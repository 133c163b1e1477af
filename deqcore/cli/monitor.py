"""`deqcore monitor`: show the log of a Monitor."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from deqcore.cli.output import AsJson, print_error, show
from deqcore.errors import MonitorError

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

LogPath = Annotated[Path, typer.Argument(help="The log that the sink jsonl writes.")]


@app.callback()
def monitor() -> None:
    """Show the log of a Monitor."""


@app.command()
def watch(
    log: LogPath,
    window: Annotated[int, typer.Option(min=1, help="Number of solves in the statistics.")] = 100,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between reads of the file.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
) -> None:
    """Follow a log in the terminal. Ctrl-C ends it. If the output is not a terminal, print one frame."""
    from deqcore.monitor.live import live_view
    from deqcore.monitor.log.reader import Tail

    tail = Tail(log)
    console = Console()
    if once or not console.is_terminal:
        console = console if console.is_terminal or "COLUMNS" in os.environ else Console(width=120)
        console.print(live_view(tail.finish(), window, console.width))
        return
    try:
        with Live(live_view(tail.log, window, console.width), console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                tail.poll()
                live.update(live_view(tail.log, window, console.width), refresh=True)
    except KeyboardInterrupt:
        console.print(live_view(tail.log, window, console.width))


@app.command()
def report(
    log: LogPath,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file. Default: the name of the log, with .html.")
    ] = None,
) -> None:
    """Write a self-contained HTML report of a log."""
    from deqcore.monitor.log.reader import read
    from deqcore.monitor.report import render

    target = log.with_suffix(".html") if out is None else out
    page = render(read(log))
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise MonitorError(f"The report {str(target)!r} cannot be written: {error.strerror}.") from None
    typer.echo(str(target))


@app.command()
def metrics(as_json: AsJson = False) -> None:
    """List the metrics with their units and meanings."""
    from deqcore.monitor.metrics import COUNTERS, STANDARD

    listed = [*STANDARD, *(metric for metric, _ in COUNTERS)]
    rows = [{"metric": item.name, "unit": item.unit, "meaning": item.help} for item in listed]
    show(rows, ("metric", "unit", "meaning"), as_json=as_json)


@app.command()
def sinks(as_json: AsJson = False) -> None:
    """List the sinks and their options."""
    from deqcore import plugins
    from deqcore.cli import listing
    from deqcore.config import project

    project.load_plugins(print_error)
    show(
        listing.rows("sink", plugins.sinks().values(), {"keeps": "keeps"}),
        ("name", "options", "summary", "status", "reason"),
        as_json=as_json,
    )


@app.command()
def dashboard() -> None:
    """Print the Grafana dashboard that goes with the sinks prometheus and prometheus-textfile."""
    from deqcore.monitor.report import load

    typer.echo(json.dumps(load(), indent=2, ensure_ascii=False))
