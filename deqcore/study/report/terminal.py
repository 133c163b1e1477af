"""Tables for a terminal: what does not fit beside the labels of the rows stands below, and nothing is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rich import box
from rich.cells import cell_len
from rich.console import Group, JustifyMethod
from rich.table import Table
from rich.text import Text

GAP: Final = 3  # between columns
SHORT: Final = 26  # the widest text that is not broken into lines
WORD: Final = 14  # the widest word of a head that is not broken


def fitted(
    heads: Sequence[str],
    lines: Sequence[Sequence[str]],
    labels: int,
    width: int,
    *,
    title: str = "",
    styles: Sequence[str] | None = None,
) -> Group:
    """Build one table, or several below each other, none of them wider than the terminal.

    Args:
        heads: `(columns,)`.
        lines: `(rows, columns)`.
        labels: the number of columns at the left that say what a row is; each table has them.
        width: of the terminal.
        title: above the first table.
        styles: `(rows,)`, of rich; default: none.

    Example:
        >>> heads, lines = ["name", "seconds", "error"], [["exact", "12.5", "1e-05"]]
        >>> [len(fitted(heads, lines, 1, width).renderables) for width in (24, 80)]
        [2, 1]
    """
    texts = [[head, *(line[k] for line in lines)] for k, head in enumerate(heads)]
    least = [_least(head, cells) for head, *cells in texts]
    room = width - sum(size + GAP for size in least[:labels]) - GAP
    least[labels:] = [min(size, max(room, 1)) for size in least[labels:]]
    tables = []
    for columns in _parts(least, labels, width):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        widths = _grown({k: (least[k], max(map(cell_len, texts[k]))) for k in columns}, width)
        for k in columns:
            prose = any(cell_len(text) > SHORT for text in texts[k][1:])
            justify: JustifyMethod = "left" if k < labels or prose else "right"
            table.add_column(Text(heads[k]), justify=justify, overflow="fold", width=widths[k])
        for number, line in enumerate(lines):
            table.add_row(*(Text(line[k]) for k in columns), style=styles[number] if styles else None)
        tables.append(table)
    return Group(*([Text(title, style="italic")] if title else []), *tables)


def _grown(limits: Mapping[int, tuple[int, int]], width: int) -> dict[int, int]:
    """Return the width of each column, from its least and its full one; rich itself goes below a least width."""
    spare = width - sum(least + GAP for least, _ in limits.values()) + 1
    widths = {}
    for k, (least, full) in limits.items():
        widths[k] = min(full, least + max(spare, 0))
        spare -= widths[k] - least
    return widths


def _least(head: str, texts: Sequence[str]) -> int:
    """Return the least width of a column: short texts are not broken, and a head is only between its words."""
    words = [min(cell_len(word), WORD) for word in head.split()]
    return max([*words, *(min(cell_len(text), SHORT) for text in texts)], default=0)


def _parts(least: Sequence[int], labels: int, width: int) -> list[list[int]]:
    """Return the columns of each table."""
    fixed = list(range(labels))
    parts = [fixed]
    for k in range(labels, len(least)):
        taken = sum(least[i] + GAP for i in [*parts[-1], k])
        if taken > width and len(parts[-1]) > labels:
            parts.append(fixed)
        parts[-1] = [*parts[-1], k]
    return parts
