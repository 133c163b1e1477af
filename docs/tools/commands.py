"""Write docs/reference/commands.md: every command with its arguments and options, as `--help` knows them.

python docs/tools/commands.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from deqcore.cli.app import app, command
from deqcore.plugins.builtin import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "commands.md"
INTRO = """# Commands

Exit code 0: fine; 1: a check failed; 2: wrong usage, with a message of what was expected. Listings take `--json`.
Written by `python docs/tools/commands.py`; a test keeps it true.
"""


def described(name: str, found: Any, parent: Any, depth: int = 2) -> Iterator[str]:
    """Write a command, then the commands below it."""
    context = typer.Context(found, info_name=name, parent=parent)
    yield f"{'#' * depth} {context.command_path}"
    yield f"    {context.command_path} {' '.join(found.collect_usage_pieces(context))}"
    # click marks a paragraph that keeps its line breaks with a backspace character
    yield (found.help or "").replace("\b", "").strip()
    rows = [row for row in map(described_option, found.params) if row]
    if rows:
        yield "\n".join(["| | |", "|---|---|", *rows])
    for each, inner in getattr(found, "commands", {}).items():
        yield from described(each, inner, context, 3)


def described_option(option: Any) -> str:
    """Write one row of the table; nothing for `--help`."""
    if option.name in ("help", "install_completion", "show_completion"):
        return ""
    spelled = option.opts if option.opts[0].startswith("-") else [option.name.upper()]
    names = ", ".join(f"`{each}`" for each in spelled)
    words = " ".join((getattr(option, "help", "") or "").split()).replace("|", "\\|").rstrip(".")
    if isinstance(option.default, str | int | float) and option.default not in ("", False, True):
        words = f"{words} (default: `{option.default}`)".strip()
    return f"| {names} | {words} |"


def render() -> str:
    """Write the page."""
    root = typer.Context(typer.main.get_command(app), info_name="deqcore")
    parts = [part for record in COMMANDS for part in described(record.name, command(record.name), root) if part]
    return INTRO + "\n" + "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written.")
