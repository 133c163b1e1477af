"""Print listings as tables or JSON, and errors."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, TypeAlias

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deqcore.errors import DeqcoreError

TableRow: TypeAlias = Mapping[str, object]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

STYLES: Final = {
    "ok": "green",
    "heavy": "yellow",
    "note": "yellow",
    "broken": "red",
    "conflict": "red",
    "failed": "red",
    "disabled": "dim",
    "skipped": "dim",
}


def show(rows: Sequence[TableRow], columns: Iterable[str], *, as_json: bool, empty: str = "Nothing to show.") -> None:
    """Print rows.

    Args:
        rows: one mapping per row; JSON gets all of it.
        columns: which of its keys the table shows, in order; one that is empty in all rows is left out.
        as_json: print a JSON list.
        empty: the text if there are no rows.
    """
    if as_json:
        typer.echo(json.dumps(rows, indent=2, default=str))
        return
    console = table_console()
    if not rows:
        console.print(Text(empty))
        return
    cells = {column: [_cell(row.get(column)) for row in rows] for column in columns}
    shown = {column: texts for column, texts in cells.items() if any(texts)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    words = {
        column: max(len(word) for text in [Text(column), *texts] for word in text.plain.split() or [""])
        for column, texts in shown.items()
    }
    fits = sum(words.values()) + 3 * len(words) <= console.width
    for column in shown:  # a narrow column breaks its lines between words, or within them, and cuts none
        table.add_column(column, overflow="fold", min_width=words[column] if fits else None)
    for texts in zip(*shown.values(), strict=True):
        table.add_row(*texts)
    console.print(table)


def table_console() -> Console:
    """Return a console as wide as the terminal or COLUMNS; without either 200, since a script may read the text."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=200)


def print_error(error: DeqcoreError) -> None:
    """Print an error's message, red, to stderr."""
    text = Text(str(error), style="red")
    Console(stderr=True).print(Text("Error: ", style="bold red") + text, soft_wrap=True)


@contextmanager
def readable_warnings() -> Iterator[None]:
    """Show warnings without a place where that is a line of deqcore or of its command line, and not of the user.

    Example:
        >>> with readable_warnings():
        ...     print(warnings.formatwarning("slow", UserWarning, typer.main.__file__, 9), end="")
        Warning: slow
    """
    before = warnings.formatwarning
    inner = [Path(str(typer.__file__)).parent, Path(__file__).parents[1]]

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if any(Path(filename).is_relative_to(folder) for folder in inner):
            return f"Warning: {message}\n"
        return before(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def progress_printer(quiet: bool) -> Callable[[str], None]:
    """Return a function that prints progress dimly to stderr if that is a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return lambda _: None
    return lambda line: console.print(line, style="dim")


def _cell(value: object) -> Text:
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, Mapping):
        value = ", ".join(f"{name}={item!r}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    text = "" if value is None else str(value)
    return Text(text, style=STYLES.get(text, ""))
