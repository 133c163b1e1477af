"""`deqcore solvers`: what can be named as `forward.solver`, and its options."""

from __future__ import annotations

from deqcore import plugins
from deqcore.cli import listing
from deqcore.cli.output import AsJson, complain, show
from deqcore.config.project import load_plugins

COLUMNS = ("name", "summary", "options", "estimate", "status", "reason")


def command(as_json: AsJson = False) -> None:
    """List the solvers: options with defaults, and whether they leave an inverse-Jacobian estimate."""
    load_plugins(complain)
    rows = listing.rows("solver", plugins.solvers().values(), {"estimate": "has_estimate"})
    show(rows, COLUMNS, as_json=as_json)
