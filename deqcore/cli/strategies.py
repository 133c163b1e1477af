"""`deqcore strategies`: the values of `backward.strategy`, and their options."""

from __future__ import annotations

from deqcore import plugins
from deqcore.cli import listing
from deqcore.cli.output import AsJson, print_error, show
from deqcore.config.project import load_plugins

COLUMNS = ("name", "summary", "options", "needs", "exact", "status", "reason")


def command(as_json: AsJson = False) -> None:
    """List the backward strategies, with their options and defaults, and what each needs."""
    load_plugins(print_error)
    facts = {"needs": "needs", "exact": "exact"}
    show(listing.rows("strategy", plugins.strategies().values(), facts), COLUMNS, as_json=as_json)
