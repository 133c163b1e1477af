"""The report's plots, as SVG inside the page itself. Every row is drawn, and its label has its gradient error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deqcore.bench.pareto import front
from deqcore.pages.charts import INK, Canvas, colour, draw, legend, mark
from deqcore.study.report.retraining import accumulations
from deqcore.study.report.summary import SummaryRow, audit_error
from deqcore.study.report.table import relative, significant
from deqcore.study.translations import say

PARTS: Final = (("forward", 0), ("backward", 1), ("update", 7))
WIDTH: Final = 4.8  # inches: as wide as a telephone's screen, so that text stays readable there
CHART: Final = 2.9
LINE: Final = 0.19  # a line of the legend
BAR: Final = 0.3


@dataclass(frozen=True)
class Plots:
    """The rows that are drawn, each with a number that gives its colour and mark in every plot.

    Attributes:
        rows: that were trained.
        language: of the labels.
    """

    rows: Sequence[SummaryRow]
    language: str

    def say(self, word: str, **values: object) -> str:
        """Return a text in the language of the plots."""
        return say(self.language, word, **values)

    def label(self, row: SummaryRow) -> str:
        """Return a row's name and its gradient error."""
        error = row.metric("gradient_error")
        own = name(row, self.rows)
        return own if error is None else self.say("with_error", name=own, error=relative(error.mean))

    def numbered(self, *, explicit: bool = True) -> list[tuple[int, SummaryRow]]:
        """Return the rows with their numbers."""
        return [(i, row) for i, row in enumerate(self.rows) if explicit or not row.explicit]

    def labels(self, canvas: Canvas, x: str, y: str) -> None:
        """Name the axes."""
        canvas.axes.set(xlabel=self.say(x) if x else "", ylabel=self.say(y) if y else "")


Painter = Callable[[Plots, Canvas], bool]


def plots(rows: Sequence[SummaryRow], language: str = "en") -> dict[str, str]:
    """Return every plot that has something to show, by the key of its title in `translations.py`."""
    shown = Plots([row for row in rows if row.results], language)
    lines, bars = CHART + LINE * len(shown.rows), 1.0 + BAR * len(shown.rows)
    made: dict[str, tuple[Painter, float]] = {
        "plot_front": (_front, lines),
        "plot_error": (_error, lines),
        "plot_accuracy": (_accuracy, lines),
        "plot_time": (_time, bars + LINE),
        "plot_evaluations": (_evaluations, lines + LINE * len(shown.rows)),
        "plot_cosine": (_cosine, lines),
        "plot_certificate": (_certificate, lines),
        "plot_radius": (_radius, lines),
        "plot_memory": (_memory, bars),
        "plot_rounds": (_rounds, lines),
    }
    if not shown.rows:
        return {}
    drawn = {word: draw(word, _bound(paint, shown), (WIDTH, height)) for word, (paint, height) in made.items()}
    return {word: svg for word, svg in drawn.items() if svg}


def _bound(paint: Painter, shown: Plots) -> Callable[[Canvas], bool]:
    return lambda canvas: paint(shown, canvas)


def name(row: SummaryRow, rows: Sequence[SummaryRow]) -> str:
    """Return the shortest name that distinguishes a row from the others."""
    parts = [row.label]
    columns: list[Callable[[SummaryRow], str]] = [
        lambda r: r.solver,
        lambda r: f"{r.rtol:g}",
        lambda r: r.place[2],
        lambda r: r.place[1],
        lambda r: r.place[0],
    ]
    for column in columns:
        if len({column(other) for other in rows if not other.explicit}) > 1:
            parts.append(column(row))
    return " · ".join(dict.fromkeys(parts))


def measured(rows: Sequence[SummaryRow]) -> list[tuple[int, float, float]]:
    """Return the number, seconds of training and gradient error of every row that has both."""
    figures = [(i, row.metric("training"), row.metric("gradient_error")) for i, row in enumerate(rows)]
    return [(i, time.mean, error.mean) for i, time, error in figures if time is not None and error is not None]


def _front(shown: Plots, canvas: Canvas) -> bool:
    points = measured(shown.rows)
    if not points:
        return False
    for number, seconds, error in points:
        row = shown.rows[number]
        spread = row.metric("training")
        ends = None if spread is None or spread.low is None or spread.high is None else (spread.low, spread.high)
        whisker = None if ends is None else [[max(0.0, seconds - ends[0])], [ends[1] - seconds]]
        style: dict[str, Any] = {"color": colour(number), "marker": mark(number), "ms": 6, "ls": "none"}
        canvas.axes.errorbar([error], [seconds], yerr=whisker, label="\u200b" + shown.label(row), **style)
        count = shown.say("points_of", count=len(row.results))
        canvas.tip(error, seconds, f"{name(row, shown.rows)}\n{relative(error)}, {significant(seconds)} s, {count}")
    best = [points[i] for i in front([(seconds, error) for _, seconds, error in points])]
    canvas.axes.plot(
        [error for _, _, error in best],
        [seconds for _, seconds, _ in best],
        color=INK, lw=1, ls="--", drawstyle="steps-pre", zorder=0, label=shown.say("front"),
    )  # fmt: skip
    _logarithmic(canvas, "x", [error for _, _, error in points])
    canvas.axes.set_ylim(0, None)
    shown.labels(canvas, "axis_error", "axis_seconds")
    legend(canvas)
    return True


def _accuracy(shown: Plots, canvas: Canvas) -> bool:
    for number, row in shown.numbered():
        timed = [
            result
            for result in row.results.values()
            if result["times"]["training"] is not None and "epochs" in result["history"]
        ]
        if not timed:
            continue
        clocks = np.mean([clock(result) for result in timed], 0)
        curves = [[100 * epoch["validation_accuracy"] for epoch in result["history"]["epochs"]] for result in timed]
        canvas.line(number, clocks, np.mean(curves, 0), shown.label(row))
        if len(curves) > 1:
            low, high = np.min(curves, 0), np.max(curves, 0)
            canvas.axes.fill_between(clocks, low, high, color=colour(number), alpha=0.15, lw=0)
    shown.labels(canvas, "axis_seconds", "axis_accuracy")
    return _with_legend(canvas)


def clock(result: Any) -> Any:
    """Return the seconds of training at the end of each epoch, `(epochs,)`.

    Trainings that run in parallel share the machine: the seconds of one show how its epochs compare, and the time
    that was measured alone afterwards shows how long they are.
    """
    seconds = _per_epoch(result, "seconds", len(result["history"]["epochs"]), np.sum).cumsum()
    return seconds * result["times"]["training"] / seconds[-1]


def _time(shown: Plots, canvas: Canvas) -> bool:
    places, left = np.arange(len(shown.rows)), np.zeros(len(shown.rows))
    for part, number in PARTS:
        values = np.array([1e3 * _mean(row, part) for row in shown.rows])
        label = shown.say(f"part_{part}")
        canvas.axes.barh(places, values, left=left, color=colour(number), label=label, height=0.6)
        for place, (value, start) in enumerate(zip(values, left, strict=True)):
            canvas.tip(start + value / 2, place, f"{label}\n{significant(value)} ms")
        left += values
    _rows(shown, canvas, "axis_step")
    canvas.axes.figure.legend(loc="outside lower center", frameon=False, fontsize=8.5, ncols=3)
    return True


def _rows(shown: Plots, canvas: Canvas, x: str) -> None:
    """Name the rows of bars."""
    canvas.axes.set_yticks(np.arange(len(shown.rows)), [shown.label(row) for row in shown.rows], fontsize=8)
    canvas.axes.invert_yaxis()
    canvas.axes.grid(axis="y", visible=False)
    shown.labels(canvas, x, "")


def _memory(shown: Plots, canvas: Canvas) -> bool:
    memory = [row.metric("step_memory") for row in shown.rows]
    for place, value in enumerate(memory):
        if value is not None:
            canvas.axes.barh([place], [value.mean / 1e6], color=colour(place), height=0.6)
            canvas.tip(value.mean / 2e6, place, f"{significant(value.mean / 1e6)} MB")
    _rows(shown, canvas, "axis_megabytes")
    return any(value is not None for value in memory)


def _evaluations(shown: Plots, canvas: Canvas) -> bool:
    for number, row in shown.numbered(explicit=False):
        for metric, style, kind in (("evaluations_most", "-", "f"), ("vjps_most", "--", "vjps")):
            curves = _curves(row, metric)
            if curves is not None:
                canvas.line(number, _epochs(curves), curves, f"{shown.label(row)}: {kind}", ls=style)
    shown.labels(canvas, "axis_epoch", "axis_counts")
    canvas.axes.set_ylim(0, None)
    return _with_legend(canvas)


def _error(shown: Plots, canvas: Canvas) -> bool:
    drawn = _audits(shown, canvas, audit_error)
    _logarithmic(canvas, "y", drawn)
    shown.labels(canvas, "axis_epoch", "axis_error")
    return _with_legend(canvas)


def _cosine(shown: Plots, canvas: Canvas) -> bool:
    _audits(shown, canvas, lambda audit: audit["cosine"])
    shown.labels(canvas, "axis_epoch", "axis_cosine")
    return _with_legend(canvas)


def _radius(shown: Plots, canvas: Canvas) -> bool:
    _audits(shown, canvas, lambda audit: audit["radius"])
    _audits(shown, canvas, lambda audit: audit["radius_most"], again=True)
    canvas.axes.axhline(1.0, color=INK, lw=0.8, ls=":")
    shown.labels(canvas, "axis_epoch", "axis_radius")
    canvas.axes.set_ylim(0, None)
    return _with_legend(canvas)


def _certificate(shown: Plots, canvas: Canvas) -> bool:
    drawn: list[float] = []
    for number, row in shown.numbered(explicit=False):
        curves = _curves(row, "adjoint_residual")
        if curves is not None:
            canvas.line(number, _epochs(curves), curves, shown.label(row))
            drawn += list(curves)
    _logarithmic(canvas, "y", drawn)
    shown.labels(canvas, "axis_epoch", "axis_certificate")
    return _with_legend(canvas)


def _rounds(shown: Plots, canvas: Canvas) -> bool:
    numbers = {id(row): number for number, row in shown.numbered()}
    for curve in accumulations(shown.rows):
        if curve.gap is None:
            continue
        number, rounds = numbers[id(curve.row)], np.arange(1, len(curve.gap) + 1)
        means = [100 * value.mean for value in curve.gap]
        canvas.line(number, rounds, means, shown.label(curve.row), marker="o", ms=3)
        ends = [(value.low, value.high) for value in curve.gap if value.low is not None and value.high is not None]
        if len(ends) == len(curve.gap):
            low, high = 100 * np.transpose(ends)
            canvas.axes.fill_between(rounds, low, high, color=colour(number), alpha=0.15, lw=0)
        canvas.axes.set_xticks(rounds)
    drawn = _with_legend(canvas)
    canvas.axes.axhline(0.0, color=INK, lw=0.8, ls=":")
    shown.labels(canvas, "axis_round", "axis_points")
    return drawn


def _audits(shown: Plots, canvas: Canvas, read: Callable[[Any], float | None], *, again: bool = False) -> list[float]:
    """Draw what audits measured, mean over seeds, and return it; `again`: a further line of rows that have one."""
    drawn: list[float] = []
    for number, row in shown.numbered(explicit=False):
        audits = [result["history"]["audits"] for result in row.results.values()]
        values = np.array([[np.nan if read(a) is None else read(a) for a in item] for item in audits], dtype=float)
        if not values.size or np.isnan(values).all():
            continue
        style: dict[str, Any] = {"marker": "^", "ls": ":", "listed": False} if again else {"marker": mark(number)}
        epochs = [audit["epoch"] for audit in audits[0]]
        canvas.line(number, epochs, values.mean(0), shown.label(row), ms=3, **style)
        drawn += list(values.mean(0))
    return drawn


def _logarithmic(canvas: Canvas, which: str, values: Sequence[float]) -> None:
    """Use a logarithmic axis where all values are positive."""
    if not values or not min(values) > 0:
        return
    axis = canvas.axes.xaxis if which == "x" else canvas.axes.yaxis
    (canvas.axes.set_xscale if which == "x" else canvas.axes.set_yscale)("log")
    # The usual labels of a logarithmic axis are mathtext, which stays unparsed here: a data set may be called $x$.
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    narrow = max(values) < 10 * min(values)
    axis.set_minor_formatter(lambda value, _: f"{value:g}" if narrow and f"{value:.0e}"[0] in "25" else "")


def _with_legend(canvas: Canvas) -> bool:
    """Add the legend; return whether there is anything to name, which a line of reference is not."""
    drawn = bool(canvas.axes.get_legend_handles_labels()[0])
    if drawn:
        legend(canvas)
    return drawn


def _curves(row: SummaryRow, metric: str) -> Any:
    """Return means per epoch and over seeds; None where nothing was measured."""
    value = []
    for result in row.results.values():
        if "epochs" not in result["history"] or result["history"]["steps"][metric][0] is None:
            return None
        value.append(_per_epoch(result, metric, len(result["history"]["epochs"]), np.mean))
    return np.mean(value, 0)


def _per_epoch(result: Any, metric: str, epochs: int, combine: Callable[..., Any]) -> Any:
    steps = result["history"]["steps"]
    if metric == "seconds":
        values = np.sum([steps[part] for part, _ in PARTS], axis=0)
    else:
        values = np.array([np.nan if value is None else value for value in steps[metric]], dtype=float)
    return combine(values.reshape(epochs, -1), axis=1)


def _epochs(curve: Any) -> Any:
    return np.arange(1, len(curve) + 1)


def _mean(row: SummaryRow, metric: str) -> float:
    value = row.metric(metric)
    return 0.0 if value is None else value.mean
