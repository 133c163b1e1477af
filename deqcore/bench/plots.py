"""Plots of measured rows and points, as PNG files (needs matplotlib: the extra `study`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from deqcore.bench.rows import BenchRow
from deqcore.bench.sweeps import Point
from deqcore.errors import MissingExtraError
from deqcore.plugins import is_installed

MARKERS: Final = "osD^vPX*<>hp"
DPI: Final = 110


def available() -> bool:
    """Return whether matplotlib is installed."""
    return is_installed("matplotlib")


def _pyplot() -> Any:
    if not available():
        raise MissingExtraError.of("A plot", "matplotlib", "study")
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def overheads(rows: Sequence[BenchRow], path: Path, title: str) -> None:
    """Overhead of each contender on each case: medians with quartiles, on a logarithmic axis.

    Args:
        rows: of one framework; those that were not timed are left out.
        path: the PNG file.
        title: of the plot.
    """
    timed = [row for row in rows if row.seconds]
    cases = _distinct(row.case for row in timed)
    names = _distinct(row.contender for row in timed)
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.055 * len(names) * max(1, len(cases)) + 0.25 * len(cases)))
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        own = [row for row in timed if row.contender == name]
        spreads = [row.overhead for row in own]
        axes.errorbar(
            [spread.median for spread in spreads],
            [cases.index(row.case) + (i - (len(names) - 1) / 2) * height for row in own],
            xerr=[
                [max(0.0, spread.median - spread.low) for spread in spreads],
                [spread.high - spread.median for spread in spreads],
            ],
            **_style(i, name),
            linestyle="none",
            label=name,
        )
    axes.axvline(1.0, color="0.4", linewidth=1, zorder=0)
    axes.set_xscale("log")
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which(plt.matplotlib.ticker.LogFormatter(minor_thresholds=(1.5, 0.7)))  # 2 and 5, not 2 × 10⁰
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    for i in range(1, len(cases)):
        axes.axhline(i - 0.5, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlabel("overhead = seconds / (evaluations × seconds per evaluation of f); the line is 1")
    _finish(plt, figure, axes, path, title)


def curves(points: Sequence[Point], path: Path, title: str, x: str, y: str) -> None:
    """Plot one line per contender.

    Args:
        points: what is plotted, of one framework and case.
        path: the PNG file.
        title: of the plot.
        x: field of `Point` on the horizontal axis: evaluations, seconds, batch, size.
        y: field on the vertical axis: residual or seconds.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 4.6))
    for i, name in enumerate(_distinct(point.contender for point in points)):
        own = sorted((point for point in points if point.contender == name), key=lambda point: getattr(point, x))
        axes.plot(
            [getattr(point, x) for point in own],
            [getattr(point, y) for point in own],
            **_style(i, name),
            linewidth=1.5,
            label=name,
        )
    axes.set_xscale("linear" if x == "evaluations" else "log")
    axes.set_yscale("linear" if y == "seconds" and x == "evaluations" else "log")
    axes.set_xlabel(LABELS[x])
    axes.set_ylabel(LABELS[y])
    axes.grid(color="0.9")
    _finish(plt, figure, axes, path, title)


LABELS: Final = {
    "evaluations": "evaluations of f",
    "seconds": "seconds",
    "residual": "‖f(z) − z‖ / ‖f(z)‖, worst sample",
    "batch": "samples in the batch",
    "size": "numbers per sample",
}


def _style(i: int, name: str) -> dict[str, Any]:
    ours = name.startswith("deqcore")
    return {
        "color": f"C{i % 10}",
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 6 if ours else 5,
        "fillstyle": "full" if ours else "none",
    }


def _finish(plt: Any, figure: Any, axes: Any, path: Path, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False, fontsize=8)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")
    plt.close(figure)


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
