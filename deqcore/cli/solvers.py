"""`deqcore solvers`: the values of `forward.solver`, and their options."""

from __future__ import annotations

from deqcore import plugins
from deqcore.cli import listing
from deqcore.cli.output import AsJson, print_error, show
from deqcore.config.project import load_plugins

COLUMNS = ("name", "summary", "options", "estimate", "status", "reason")


def command(as_json: AsJson = False) -> None:
    """List the solvers: options with defaults, and whether they leave an inverse-Jacobian estimate."""
    load_plugins(print_error)
    rows = listing.rows("solver", plugins.solvers().values(), {"estimate": "has_estimate"})
    show(rows, COLUMNS, as_json=as_json)
