"""The report's plots, as SVG inside the page itself."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from deqcore.study.report.retraining import accumulations
from deqcore.study.report.summary import SummaryRow

PALETTE: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
PARTS: Final = (("forward", "#0072b2"), ("backward", "#d55e00"), ("update", "#999999"))
MANY: Final = 8  # lines that people can distinguish in one plot
SIZE: Final = (6.0, 3.4)  # inches


def plots(rows: Sequence[SummaryRow]) -> dict[str, str]:
    """Return every plot that has something to show, by the word of its title in `words.py`."""
    trained = [row for row in rows if row.results]
    made: dict[str, Callable[[Any, Sequence[SummaryRow]], bool]] = {
        "plot_accuracy": _accuracy,
        "plot_time": _time,
        "plot_evaluations": _evaluations,
        "plot_cosine": _cosine,
        "plot_certificate": _certificate,
        "plot_radius": _radius,
        "plot_memory": _memory,
        "plot_rounds": _rounds,
    }
    drawn = {word: _draw(word, draw, trained) for word, draw in made.items() if trained}
    return {word: svg for word, svg in drawn.items() if svg}


def _draw(word: str, draw: Callable[[Any, Sequence[SummaryRow]], bool], rows: Sequence[SummaryRow]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # Text stays text: small, searchable, and in the reader's own font. A salt of its own keeps ids in a page apart.
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": word,
        "text.parse_math": False,
        "font.size": 9,
        "font.family": "sans-serif",
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has it
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if not draw(axes, rows):
            return ""
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    return drawn[drawn.index("<svg") :]


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


def _accuracy(axes: Any, rows: Sequence[SummaryRow]) -> bool:
    for row, colour in zip(rows[:MANY], PALETTE, strict=False):
        timed = [result for result in row.results.values() if result["times"]["training"] is not None]
        if not timed:
            continue
        clocks = [clock(result) for result in timed]
        curves = [[100 * epoch["validation_accuracy"] for epoch in result["history"]["epochs"]] for result in timed]
        axes.plot(np.mean(clocks, 0), np.mean(curves, 0), color=colour, label=name(row, rows))
        if len(curves) > 1:
            axes.fill_between(np.mean(clocks, 0), np.min(curves, 0), np.max(curves, 0), color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="seconds of training", ylabel="%")
    if value := bool(axes.lines):
        axes.legend(frameon=False)
    return value


def clock(result: Any) -> Any:
    """Return the seconds of training at the end of each epoch, `(epochs,)`.

    Trainings that run in parallel share the machine: the seconds of one show how its epochs compare, and the time
    that was measured alone afterwards shows how long they are.
    """
    seconds = _per_epoch(result, "seconds", len(result["history"]["epochs"]), np.sum).cumsum()
    return seconds * result["times"]["training"] / seconds[-1]


def _time(axes: Any, rows: Sequence[SummaryRow]) -> bool:
    places, left = np.arange(len(rows)), np.zeros(len(rows))
    for part, colour in PARTS:
        values = np.array([1e3 * _mean(row, part) for row in rows])
        axes.barh(places, values, left=left, color=colour, label=part, height=0.6)
        left += values
    axes.set_yticks(places, [name(row, rows) for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="ms per step (median)")
    axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return True


def _evaluations(axes: Any, rows: Sequence[SummaryRow]) -> bool:
    shown = [row for row in rows if not row.explicit][:MANY]
    for row, colour in zip(shown, PALETTE, strict=False):
        for metric, style in (("evaluations_most", "-"), ("vjps_most", "--")):
            curves = _curves(row, metric)
            if curves is not None:
                kind = "f" if style == "-" else "vjps"
                axes.plot(_epochs(curves), curves, style, color=colour, label=f"{name(row, rows)}: {kind}")
    axes.set(xlabel="epoch", ylabel="per step", ylim=(0, None))
    if shown:
        axes.legend(frameon=False, fontsize=8, ncols=min(len(shown), 3), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return bool(shown)


def _cosine(axes: Any, rows: Sequence[SummaryRow]) -> bool:
    result = _audits(axes, rows, ("cosine",))
    axes.set(xlabel="epoch", ylabel="cosine")
    return result


def _radius(axes: Any, rows: Sequence[SummaryRow]) -> bool:
    result = _audits(axes, rows, ("radius", "radius_most"))
    axes.axhline(1.0, color="#666666", lw=0.8, ls=":")
    axes.set(xlabel="epoch", ylabel="|λ|max", ylim=(0, None))
    return result


def _certificate(axes: Any, rows: Sequence[SummaryRow]) -> bool:
    result = False
    for row, colour in zip([row for row in rows if not row.explicit], PALETTE, strict=False):
        curves = _curves(row, "adjoint_residual")
        if curves is not None:
            result = True
            axes.semilogy(_epochs(curves), curves, color=colour, label=name(row, rows))
    axes.set(xlabel="epoch", ylabel="‖g + Jᵀu − u‖ / ‖g‖")
    # The usual labels of a logarithmic axis are mathtext, which stays unparsed here: a data set may be called $x$.
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    if result:
        axes.legend(frameon=False)
    return result


def _memory(axes: Any, rows: Sequence[SummaryRow]) -> bool:
    places = np.arange(len(rows))
    axes.barh(places, [_mean(row, "peak_memory") / 1e6 for row in rows], color=PALETTE[0], height=0.6)
    axes.set_yticks(places, [name(row, rows) for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="MB")
    return True


def _rounds(axes: Any, rows: Sequence[SummaryRow]) -> bool:
    result = [accumulation for accumulation in accumulations(rows) if accumulation.gap]
    for each, colour in zip(result[:MANY], PALETTE[1:] + PALETTE[:1], strict=False):
        gap = each.gap or ()
        numbers = np.arange(1, len(gap) + 1)
        axes.plot(numbers, [100 * value.mean for value in gap], "o-", ms=3, color=colour, label=name(each.row, rows))
        ends = [(value.low, value.high) for value in gap if value.low is not None and value.high is not None]
        if len(ends) == len(gap):
            low, high = 100 * np.transpose(ends)
            axes.fill_between(numbers, low, high, color=colour, alpha=0.15, lw=0)
        axes.set_xticks(numbers)
    axes.axhline(0.0, color="#666666", lw=0.8, ls=":")
    axes.set(xlabel="round", ylabel="points")
    if result:
        axes.legend(frameon=False)
    return bool(result)


def _audits(axes: Any, rows: Sequence[SummaryRow], metrics: Sequence[str]) -> bool:
    value = False
    for row, colour in zip([row for row in rows if not row.explicit], PALETTE, strict=False):
        audits = [result["history"]["audits"] for result in row.results.values()]
        if not audits[0]:
            continue
        value = True
        epochs = [audit["epoch"] for audit in audits[0]]
        for metric, style in zip(metrics, ("o-", "^:"), strict=False):
            values = np.array([[np.nan if a[metric] is None else a[metric] for a in item] for item in audits])
            label = name(row, rows) if style == "o-" else None
            axes.plot(epochs, values.mean(0), style, ms=3, color=colour, label=label)
    if value:
        axes.legend(frameon=False)
    return value


def _curves(row: SummaryRow, metric: str) -> Any:
    """Return means per epoch and over seeds; None where nothing was measured."""
    value = []
    for result in row.results.values():
        if result["history"]["steps"][metric][0] is None:
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
