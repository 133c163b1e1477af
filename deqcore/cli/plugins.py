"""`deqcore plugins`: every plugin and its status."""

from __future__ import annotations

from dataclasses import asdict

from deqcore import plugins
from deqcore.cli.output import AsJson, print_error, show
from deqcore.config.project import load_plugins

COLUMNS = ("name", "version", "source", "hooks", "status", "reason")


def command(as_json: AsJson = False) -> None:
    """List the plugins with their versions, hooks and status.

    Built-in solvers, strategies and backends are not included: see `deqcore backends`, `solvers` and `strategies`.
    """
    load_plugins(print_error)
    rows = [asdict(status) for status in plugins.plugins_status()]
    show(rows, COLUMNS, as_json=as_json, empty="No plugins are installed.")
