"""The live view of a log in a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deqcore.monitor.depths import depths_by_layer
from deqcore.monitor.log.reader import Log, series
from deqcore.monitor.metrics import STANDARD, readable

BARS: Final = "▁▂▃▄▅▆▇█"
WIDTH: Final = 24
WIDE: Final = 100
EVENTS: Final = 6
STYLES: Final = {"fired": "yellow", "cleared": "green", "retrain": "bold red", "sink": "red", "note": "dim"}
ORDER: Final = {metric.name: index for index, metric in enumerate(STANDARD)}


def live_view(log: Log, window: int, width: int = 120, now: float | None = None) -> RenderableType:
    """Return a frame.

    Args:
        log: what is shown.
        window: rows that mean, least and most are taken over.
        width: of the terminal; a narrow one gets fewer columns.
        now: seconds since the epoch; default: the present.
    """
    parts: list[RenderableType] = [_title(log, time.time() if now is None else now)]
    if log.retrain is not None:
        parts.append(Panel(Text(f"RETRAIN: {log.retrain.message}"), style="bold red", box=box.HEAVY))
    parts.append(_table(log, window, width >= WIDE) if log.rows else Text("No rows yet.", style="dim"))
    parts.extend(_depths(log, window))
    if log.events:
        parts.append(_events(log))
    if log.problems:
        parts.append(Text(f"{len(log.problems)} lines could not be read. {log.problems[-1]}", style="yellow"))
    return Group(*parts)


def _title(log: Log, now: float) -> Text:
    text = Text(str(log.path), style="bold")
    if log.rows:
        last = log.rows[-1]
        age = max(0.0, now - last.time)
        text.append(f"  step {last.step} · {log.solves} solves · last {_ago(age)} ago", style="default not bold")
    if log.left_out:
        text.append(f" · {log.left_out} earlier run(s) in this file left out", style="dim not bold")
    return text


def _table(log: Log, window: int, wide: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
    table.add_column("metric", no_wrap=True, overflow="fold")
    for heading in ("latest", "mean", "least", "most") if wide else ("latest", "mean"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"last {window}", no_wrap=True)
    result = sorted(series(log.rows[-window:]), key=lambda item: (item[1], ORDER.get(item[0], len(ORDER))))
    digits = 4 if wide else 3
    for metric, layer, _, values in result:
        available = [value for value in values if math.isfinite(value)]
        mean = sum(available) / len(available) if available else math.inf
        name = Text(f"{layer}/" if layer else "", style="cyan") + Text(metric.removeprefix("deq_"))
        cells = (values[-1], mean, min(values), max(values)) if wide else (values[-1], mean)
        bars = Text(sparkline(values, WIDTH if wide else WIDTH // 3), style="blue")
        table.add_row(name, *(readable(metric, value, digits) for value in cells), bars)
    return table


def _depths(log: Log, window: int) -> list[Text]:
    """Return a line for each layer: the units by their depth, over the latest rows."""
    lines = []
    for layer, counts in depths_by_layer(log.rows[-window:]).items():
        bars = sparkline(list(counts.values()), WIDTH) if len(counts) > 1 else BARS[-1]
        low, high, units = min(counts), max(counts), sum(counts.values())
        name = Text(f"{layer}/" if layer else "", style="cyan") + Text("depth of each unit  ")
        lines.append(name + Text(f"{low} ") + Text(bars, style="blue") + Text(f" {high} steps, {units} units"))
    return lines


def _events(log: Log) -> Panel:
    lines = [
        Text(f"{event.kind:8}", style=STYLES.get(event.kind, "")) + Text(event.message)
        for event in log.events[-EVENTS:]
    ]
    return Panel(Group(*lines), title=f"events ({len(log.events)})", title_align="left", box=box.ROUNDED)


def sparkline(values: Sequence[float], width: int) -> str:
    """Return the latest values as bars, as many as fit; × stands for what is not finite.

    Example:
        >>> sparkline([0, 1, 2, 3, float("inf")], 10)
        '▁▃▆█×'
    """
    shown = list(values)
    if len(shown) > width:  # means of equal parts, so that the whole window is seen
        edges = [round(i * len(shown) / width) for i in range(width + 1)]
        shown = [sum(shown[a:b]) / (b - a) for a, b in pairwise(edges)]
    available = [value for value in shown if math.isfinite(value)]
    low, high = (min(available), max(available)) if available else (0.0, 0.0)
    span = (high / 2 - low / 2) or 1.0  # halves: the whole may be beyond the largest number
    return "".join(
        BARS[round((value / 2 - low / 2) / span * (len(BARS) - 1))] if math.isfinite(value) else "×" for value in shown
    )


def _ago(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
