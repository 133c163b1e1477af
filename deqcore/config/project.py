"""The settings and plugins of the working directory's project, for commands that can run without them."""

from __future__ import annotations

from collections.abc import Callable

from deqcore.config.config import Config
from deqcore.errors import DeqcoreError


def load_plugins(report: Callable[[DeqcoreError], object]) -> None:
    """Execute the `deqfile.py` of the working directory if its `deq.toml` asks for it.

    Args:
        report: gets a mistake in either, which does not stop the command.
    """
    try:
        Config.discover()
    except DeqcoreError as error:
        report(error)
