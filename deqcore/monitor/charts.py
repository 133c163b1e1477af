"""The charts of a report, as SVG to stand inside a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deqcore.monitor.log import Log, series

POINTS: Final = 400
LABEL: Final = 40  # characters of a layer's name: laying out a long text takes minutes
MOST: Final = 1e150  # beyond it a chart's own arithmetic overflows; such values are left out as infinite ones are
COLORS: Final = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")


@dataclass(frozen=True)
class Chart:
    """What one chart shows.

    Attributes:
        title: above it.
        metrics: each a line, per layer.
        log: a logarithmic axis.
    """

    title: str
    metrics: tuple[str, ...]
    unit: str
    log: bool = False


CHARTS: Final = (
    Chart("Solver steps", ("deq_forward_steps", "deq_forward_steps_max"), "steps"),
    Chart("Forward residual", ("deq_forward_residual", "deq_forward_residual_max"), "‖f(z) − z‖", log=True),
    Chart("Samples that failed", ("deq_unconverged_fraction", "deq_nonfinite_fraction"), "fraction"),
    Chart("Backward products", ("deq_backward_steps", "deq_backward_steps_max"), "products"),
    Chart(
        "Adjoint residual and certificate",
        ("deq_backward_residual", "deq_backward_residual_max", "deq_backward_error"),
        "relative",
        log=True,
    ),
    Chart(
        "What became of gradients",
        ("deq_uncertified_fraction", "deq_refined_fraction", "deq_fallback_fraction"),
        "fraction of samples",
    ),
    Chart("Gradient audit", ("deq_gradient_cosine", "deq_gradient_error"), ""),
    Chart("Spectral radius", ("deq_spectral_radius",), "ρ(J)"),
    Chart("Drift: stability index", ("deq_residual_psi", "deq_steps_psi"), "PSI"),
    Chart("Drift: Kolmogorov–Smirnov", ("deq_residual_ks", "deq_steps_ks"), "distance"),
    Chart("Host time", ("deq_forward_seconds", "deq_backward_seconds"), "seconds"),
)


def draw(log: Log) -> list[tuple[str, str]]:
    """Title and SVG of every chart that the log has data for; metrics of one's own get one each."""
    found = {(metric, layer): (steps, values) for metric, layer, steps, values in series(log.rows)}
    shown = {metric for chart in CHARTS for metric in chart.metrics} | {
        "deq_retrain",
        "deq_forward_evaluations",
        "deq_residual_ks_pvalue",
        "deq_steps_ks_pvalue",
    }
    own = dict.fromkeys(metric for metric, _ in found if metric not in shown)
    charts = [
        *CHARTS,
        *(Chart(_short(metric, 2 * LABEL), (metric,), _short(log.units.get(metric, ""))) for metric in own),
    ]
    marks = [(event.step, event.kind) for event in log.events if event.kind in ("fired", "retrain")]
    drawn = []
    for chart in charts:
        lines = [
            (_label(metric, layer), *found[metric, layer])
            for metric, layer in found
            if metric in chart.metrics and _drawable(found[metric, layer][1]).any()
        ]
        if lines:
            drawn.append((chart.title, _svg(chart, lines, marks)))
    return drawn


def _label(metric: str, layer: str) -> str:
    name = metric.removeprefix("deq_").replace("_", " ")
    return _short(f"{_short(layer)}: {name}" if layer else name, 2 * LABEL)


def _short(text: str, most: int = LABEL) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _svg(chart: Chart, lines: Sequence[tuple[str, list[int], list[float]]], marks: Sequence[tuple[int, str]]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(5.6, 2.9), layout="constrained")
        axes: Any = figure.add_subplot()
        for color, (label, steps, values) in zip(_cycle(len(lines)), lines, strict=True):
            _line(axes, color, label, np.asarray(steps, float), np.asarray(values, float))
        for step, kind in sorted(marks[:50], key=lambda mark: mark[1] == "retrain"):  # red is on top
            axes.axvline(step, color="#dc2626" if kind == "retrain" else "#f59e0b", linewidth=0.8, linestyle="--")
        if chart.log and all(min(values) > 0 for _, _, values in lines):
            axes.set_yscale("log")
        elif chart.unit.startswith("fraction"):
            axes.set_ylim(-0.02, max(0.1, 1.1 * axes.get_ylim()[1]))
        axes.set_xlabel("step")
        axes.set_ylabel(chart.unit)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="best")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _drawable(values: Any) -> Any:
    return np.abs(values) < MOST


def _line(axes: Any, color: str, label: str, steps: Any, values: Any) -> None:
    """Means of at most `POINTS` parts, with the range of each behind; what is not finite is left out."""
    known = _drawable(values)
    parts = min(POINTS, int(known.sum()))
    groups = [np.array_split(array[known], parts) for array in (steps, values)]
    middle = [group.mean() for group in groups[0]]
    if parts < known.sum():
        low, high = ([limit(group) for group in groups[1]] for limit in (np.min, np.max))
        axes.fill_between(middle, low, high, color=color, alpha=0.15, linewidth=0)
    # Labels that begin with an underscore would be left out of the legend, and $ would be read as mathematics.
    axes.plot(
        middle,
        [group.mean() for group in groups[1]],
        color=color,
        label="\u200b" + label.replace("$", r"\$"),
        linewidth=1.4,
        marker="." if parts == 1 else None,
    )


def _cycle(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]
