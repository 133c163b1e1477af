"""The report of a log: one self-contained HTML page."""

from __future__ import annotations

import io
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import numpy as np

from deqcore.errors import MissingExtraError
from deqcore.monitor.log.reader import Log, series
from deqcore.monitor.metrics import STANDARD
from deqcore.plugins.lookup import is_installed

POINTS: Final = 400
LABEL: Final = 40  # characters of a layer's name: laying out a long text takes minutes
MOST: Final = 1e150  # beyond it a chart's own arithmetic overflows; such values are left out as infinite ones are
COLORS: Final = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")

HELP: Final = {metric.name: metric.help for metric in STANDARD}
ORDER: Final = {metric.name: index for index, metric in enumerate(STANDARD)}
# The first screen: metric, title, and above which value it is a concern.
TILES: Final = (
    ("deq_forward_steps", "solver steps", None),
    ("deq_unconverged_fraction", "unconverged", 0.01),
    ("deq_nonfinite_fraction", "NaN or diverged", 0.0),
    ("deq_backward_steps", "backward products", None),
    ("deq_backward_error", "certified gradient error", 0.5),
    ("deq_fallback_fraction", "fallbacks", 0.05),
    ("deq_spectral_radius", "spectral radius", 1.0),
    ("deq_steps_psi", "drift of steps (PSI)", 0.25),
)


@dataclass(frozen=True)
class Tile:
    """A number of the first screen: its median over the last tenth of the log."""

    title: str
    value: str
    concern: bool


def render(log: Log) -> str:
    """Return the page.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        if not is_installed(package):
            raise MissingExtraError.of("deqcore monitor report", package, "monitor")
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    text = (files("deqcore.monitor") / "report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(text).render(
        log=log,
        verdict=verdict(log),
        tiles=tiles(log),
        charts=[(title, Markup(svg)) for title, svg in draw(log)],
        table=table(log),
        layers=any(row.name for row in log.rows),
        events=[(event, _clock(event.time)) for event in log.events],
        span=_span(log),
        config=json.dumps(log.config, indent=2, default=str, ensure_ascii=False),
    )


def verdict(log: Log) -> tuple[str, str]:
    """Return the answer in one sentence, and its class: "bad", "warn" or "good"."""
    if log.retrain is not None:
        return f"Retrain: {log.retrain.message}", "bad"
    if not log.rows:
        return "The log has no rows: no solve ran while the monitor was active.", "warn"
    open_triggers: dict[tuple[str, str], str] = {}
    for event in log.events:
        if event.kind == "fired":
            open_triggers[event.metric, event.action] = event.message
        elif event.kind == "cleared":
            open_triggers.pop((event.metric, event.action), None)
    if open_triggers:
        return f"{len(open_triggers)} trigger(s) still active. {next(iter(open_triggers.values()))}", "warn"
    concerns = [tile.title for tile in tiles(log) if tile.concern]
    if concerns:
        return f"No trigger is active, but check: {', '.join(concerns)}.", "warn"
    return "No trigger is active, and the solves are healthy.", "good"


def tiles(log: Log) -> list[Tile]:
    """Return the numbers of the first screen."""
    latest: dict[str, list[float]] = {}
    for metric, _, _, values in series(log.rows[-max(20, len(log.rows) // 10) :]):
        latest.setdefault(metric, []).extend(values)
    result = []
    for metric, title, limit in TILES:
        if metric in latest:
            value = statistics.median(latest[metric])
            result.append(Tile(title, f"{value:.3g}", limit is not None and value > limit))
    return result


def table(log: Log) -> list[dict[str, str]]:
    """Return all metrics with their statistics, as text."""
    result = sorted(series(log.rows), key=lambda item: (item[1], ORDER.get(item[0], len(ORDER))))
    return [
        {
            "metric": metric,
            "layer": layer,
            "unit": log.units.get(metric, ""),
            "help": HELP.get(metric, ""),
            "count": str(len(values)),
            **{name: f"{value:.4g}" for name, value in _statistics(values).items()},
        }
        for metric, layer, _, values in result
    ]


def _statistics(values: list[float]) -> dict[str, float]:
    finite = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(finite) if finite else math.inf
    return {"first": values[0], "last": values[-1], "mean": mean, "least": min(values), "most": max(values)}


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (OverflowError, OSError, ValueError):  # no time of any calendar
        return f"{seconds:g} s"


def _span(log: Log) -> str:
    if not log.rows:
        return "no rows"
    first, last = log.rows[0], log.rows[-1]
    return f"{log.solves} solves, steps {first.step} to {last.step}, {_clock(first.time)} to {_clock(last.time)} UTC"


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
        "Outcome of gradients",
        ("deq_uncertified_fraction", "deq_refined_fraction", "deq_fallback_fraction"),
        "fraction of samples",
    ),
    Chart("Coupling of rows", ("deq_coupling",), "fraction"),
    Chart("Gradient audit", ("deq_gradient_cosine", "deq_gradient_error"), ""),
    Chart("Spectral radius", ("deq_spectral_radius",), "ρ(J)"),
    Chart("Drift: stability index", ("deq_residual_psi", "deq_steps_psi"), "PSI"),
    Chart("Drift: Kolmogorov–Smirnov", ("deq_residual_ks", "deq_steps_ks"), "distance"),
    Chart("Host time", ("deq_forward_seconds", "deq_backward_seconds"), "seconds"),
)


def draw(log: Log) -> list[tuple[str, str]]:
    """Return the title and SVG of every chart that the log has data for; each user metric gets one."""
    result = {(metric, layer): (steps, values) for metric, layer, steps, values in series(log.rows)}
    shown = {metric for chart in CHARTS for metric in chart.metrics} | {
        "deq_retrain",
        "deq_forward_evaluations",
        "deq_residual_ks_pvalue",
        "deq_steps_ks_pvalue",
    }
    own = dict.fromkeys(metric for metric, _ in result if metric not in shown)
    charts = [
        *CHARTS,
        *(Chart(_short(metric, 2 * LABEL), (metric,), _short(log.units.get(metric, ""))) for metric in own),
    ]
    marks = [(event.step, event.kind) for event in log.events if event.kind in ("fired", "retrain")]
    drawn = []
    for chart in charts:
        lines = [
            (_label(metric, layer), *result[metric, layer])
            for metric, layer in result
            if metric in chart.metrics and _drawable(result[metric, layer][1]).any()
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
    """Plot the means of at most `POINTS` parts over the range of each; skip values that are not finite."""
    available = _drawable(values)
    parts = min(POINTS, int(available.sum()))
    groups = [np.array_split(array[available], parts) for array in (steps, values)]
    middle = [group.mean() for group in groups[0]]
    if parts < available.sum():
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


def load() -> dict[str, object]:
    """Return the dashboard, ready to be imported in Grafana (Dashboards, New, Import)."""
    text = (files("deqcore.monitor") / "grafana.json").read_text(encoding="utf-8")
    results: dict[str, object] = json.loads(text)
    return results
