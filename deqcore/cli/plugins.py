"""`deqcore plugins`: every plugin, working or not, and why not."""

from __future__ import annotations

from dataclasses import asdict

from deqcore import plugins
from deqcore.cli.output import AsJson, complain, show
from deqcore.config.project import load_plugins

COLUMNS = ("name", "version", "source", "hooks", "status", "reason")


def command(as_json: AsJson = False) -> None:
    """List the plugins: name, version, hooks, and whether they work.

    What ships with deqcore is not among them: see `deqcore backends`, `solvers` and `strategies`.
    """
    load_plugins(complain)
    rows = [asdict(status) for status in plugins.plugins_status()]
    show(rows, COLUMNS, as_json=as_json, empty="No plugins are installed.")
