"""What a listing sees of the project it is called in."""

from __future__ import annotations

from deqcore.cli.output import print_error
from deqcore.config import Config
from deqcore.errors import DeqcoreError


def load_plugins() -> None:
    """Execute the `deqfile.py` of the working directory if its `deq.toml` asks for it.

    A mistake in either is told on stderr and costs nobody the listing.
    """
    try:
        Config.discover()
    except DeqcoreError as error:
        print_error(error)
