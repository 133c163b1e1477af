"""The report of a log: one self-contained HTML page."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

import numpy as np

from deqcore.errors import MissingExtraError
from deqcore.monitor.depths import depths_by_layer
from deqcore.monitor.log.reader import Log, series
from deqcore.monitor.metrics import STANDARD, is_share, mean, readable
from deqcore.pages import template
from deqcore.pages.charts import Canvas, colour, legend
from deqcore.pages.charts import draw as draw_chart
from deqcore.plugins.lookup import is_installed

POINTS: Final = 400
LABEL: Final = 40  # characters of a layer's name: laying out a long text takes minutes
MOST: Final = 1e150  # beyond it a chart's own arithmetic overflows; such values are left out as infinite ones are

HELP: Final = {metric.name: metric.help for metric in STANDARD}
ORDER: Final = {metric.name: index for index, metric in enumerate(STANDARD)}
# The first screen: metric, title, and above which value of any solve it is a concern.
TILES: Final = (
    ("deq_forward_steps_max", "solver steps", None),
    ("deq_forward_residual_max", "forward residual", None),
    ("deq_unconverged_fraction", "unconverged", 0.0),
    ("deq_nonfinite_fraction", "NaN or diverged", 0.0),
    ("deq_backward_steps_max", "backward products", None),
    ("deq_uncertified_fraction", "gradients that missed their target", 0.0),
    ("deq_backward_error", "estimated gradient error", 0.5),
    ("deq_fallback_fraction", "fallbacks", 0.05),
    ("deq_spectral_radius", "spectral radius", 1.0),
    ("deq_steps_psi", "drift of steps (PSI)", 0.25),
)
WARNINGS: Final = ("fired", "retrain", "sink", "note")
"""Kinds of events that say that something is wrong; "cleared" says that it has ended."""


@dataclass(frozen=True)
class Tile:
    """A number of the first screen.

    Attributes:
        title: of the metric.
        value: the worst of all solves.
        detail: the median, and in how many solves the value is a concern.
        concern: whether it is in any.
    """

    title: str
    value: str
    detail: str
    concern: bool


def render(log: Log) -> str:
    """Return the page.

    Raises:
        MissingExtraError: matplotlib or jinja2 is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        if not is_installed(package):
            raise MissingExtraError.of("deqcore monitor report", package, "monitor")
    from markupsafe import Markup

    return template.render(
        "deqcore.monitor",
        "report.html.j2",
        title=f"deqcore monitor: {log.path.name}",
        log=log,
        verdict=verdict(log),
        tiles=tiles(log),
        charts=[(title, Markup(svg)) for title, svg in draw(log)],
        table=table(log),
        layers=any(row.name for row in log.rows),
        events=[(event, _clock(event.time)) for event in log.events],
        span=_span(log),
        settings=settings(log),
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
        first = next(iter(open_triggers.values()))
        return f"{len(open_triggers)} trigger(s) still active, the first since {first}", "warn"
    concerns = [f"{tile.title} (worst {tile.value}, {tile.detail})" for tile in tiles(log) if tile.concern]
    fired = sum(event.kind in WARNINGS for event in log.events)
    concerns += [f"{fired} event(s) that warn of something"] if fired else []
    if concerns:
        return f"No trigger is active, but check: {'; '.join(concerns)}.", "warn"
    return "All solves converged, and nothing gave a warning.", "good"


def tiles(log: Log) -> list[Tile]:
    """Return the numbers of the first screen, over the whole log: the worst counts."""
    values: dict[str, list[float]] = {}
    for metric, _, _, figures in series(log.rows):
        values.setdefault(metric, []).extend(figures)
    return [_tile(metric, title, values[metric], limit) for metric, title, limit in TILES if metric in values]


def _tile(metric: str, title: str, values: Sequence[float], limit: float | None) -> Tile:
    bad = 0 if limit is None else sum(value > limit for value in values)
    detail = f"median {readable(metric, statistics.median(values), 3)}"
    detail += "" if limit is None else f", above {readable(metric, limit)} in {bad} of {len(values)}"
    return Tile(title, readable(metric, max(values), 3), detail, bad > 0)


def settings(log: Log) -> list[dict[str, str]]:
    """Return the settings that each layer ran with, in the order of their first solves."""
    return [
        {
            "layer": row.name or "–",
            "step": str(row.step),
            "forward": _sentence(row.settings.get("forward"), "solver"),
            "backward": _sentence(row.settings.get("backward"), "strategy"),
            "all": json.dumps(row.settings, indent=1, default=str, ensure_ascii=False),
        }
        for row in log.rows
        if row.settings
    ]


def _sentence(section: object, first: str) -> str:
    """Return a section's solver or strategy, its options, and the tolerance of a solver."""
    if not isinstance(section, Mapping):
        return "–"
    options = section.get("options")
    shown = dict(options) if isinstance(options, Mapping) else {}
    shown |= {name: section[name] for name in ("rtol", "max_steps") if name in section}
    return f"{section.get(first, '–')} ({', '.join(f'{name}={value}' for name, value in shown.items())})"


def table(log: Log) -> list[dict[str, str]]:
    """Return all metrics with their statistics, as text."""
    result = sorted(series(log.rows), key=lambda item: (item[1], ORDER.get(item[0], len(ORDER))))
    return [
        {
            "metric": metric,
            "layer": layer,
            "unit": _unit(log, metric),
            "help": HELP.get(metric, ""),
            "count": str(len(values)),
            **{name: f"{_scale(metric) * value:.4g}" for name, value in _statistics(values).items()},
        }
        for metric, layer, _, values in result
    ]


def _unit(log: Log, metric: str) -> str:
    return "%" if is_share(metric) else log.units.get(metric, "")


def _scale(metric: str) -> float:
    return 100.0 if is_share(metric) else 1.0


def _statistics(values: list[float]) -> dict[str, float]:
    finite = [value for value in values if math.isfinite(value)]
    middle = mean(finite) if finite else math.inf
    return {"first": values[0], "last": values[-1], "mean": middle, "least": min(values), "most": max(values)}


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
    Chart("Samples that failed", ("deq_unconverged_fraction", "deq_nonfinite_fraction"), "% of samples"),
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
        "% of samples",
    ),
    Chart("Coupling of rows", ("deq_coupling",), "ratio"),
    Chart("Gradient audit", ("deq_gradient_cosine", "deq_gradient_error"), ""),
    Chart("Spectral radius", ("deq_spectral_radius",), "ρ(J)"),
    Chart("Drift: stability index", ("deq_residual_psi", "deq_steps_psi"), "PSI"),
    Chart("Drift: Kolmogorov–Smirnov", ("deq_residual_ks", "deq_steps_ks"), "distance"),
    Chart("Host time", ("deq_forward_seconds", "deq_backward_seconds"), "seconds"),
)


def draw(log: Log) -> list[tuple[str, str]]:
    """Return the title and SVG of every chart that the log has data for; each user metric gets one."""
    result = {
        (metric, layer): (steps, [_scale(metric) * value for value in values])
        for metric, layer, steps, values in series(log.rows)
    }
    shown = {metric for chart in CHARTS for metric in chart.metrics} | {
        "deq_retrain",
        "deq_forward_evaluations",
        "deq_residual_ks_pvalue",
        "deq_steps_ks_pvalue",
    }
    own = dict.fromkeys(metric for metric, _ in result if metric not in shown)
    charts = [
        *CHARTS,
        *(Chart(_short(metric, 2 * LABEL), (metric,), _short(_unit(log, metric))) for metric in own),
    ]
    marks = [(event.step, event.kind) for event in log.events if event.kind in ("fired", "retrain")]
    drawn = []
    for chart in charts:
        lines = [
            (_label(metric, layer), steps, values)
            for (metric, layer), (steps, values) in result.items()
            if metric in chart.metrics and _drawable(values).any()
        ]
        if lines:
            drawn.append((chart.title, _svg(chart, lines, marks)))
    if depths := depths_by_layer(log.rows):
        drawn.append(("Depth of each unit", _histogram(depths)))
    return drawn


def _histogram(depths: Mapping[str, Mapping[int, int]]) -> str:
    """Draw the share of the units by their depth, over the whole log: bars for each layer."""
    bounds = sorted({bound for counts in depths.values() for bound in counts})
    width = 0.8 / len(depths)

    def paint(canvas: Canvas) -> bool:
        for number, (layer, counts) in enumerate(depths.items()):
            shares = [100 * counts.get(bound, 0) / sum(counts.values()) for bound in bounds]
            places = [place + (number - (len(depths) - 1) / 2) * width for place in range(len(bounds))]
            label = _short(layer) or "all units"
            canvas.axes.bar(places, shares, width, color=colour(number), label="\u200b" + label)
            for place, bound, share in zip(places, bounds, shares, strict=True):
                canvas.tip(place, share, f"{label}\n{bound} steps: {share:.3g} % ({counts.get(bound, 0)})")
        canvas.axes.set_xticks(range(len(bounds)), [str(bound) for bound in bounds])
        canvas.axes.set_xlabel("steps, up to")
        canvas.axes.set_ylabel("% of units")
        legend(canvas)
        return True

    return draw_chart("depth", paint, (4.8, 2.6 + 0.19 * len(depths)))


def _label(metric: str, layer: str) -> str:
    name = metric.removeprefix("deq_").replace("_", " ")
    return _short(f"{_short(layer)}: {name}" if layer else name, 2 * LABEL)


def _short(text: str, most: int = LABEL) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _svg(chart: Chart, lines: Sequence[tuple[str, list[int], list[float]]], marks: Sequence[tuple[int, str]]) -> str:
    def paint(canvas: Canvas) -> bool:
        axes = canvas.axes
        for number, (label, steps, values) in enumerate(lines):
            _line(canvas, number, label, np.asarray(steps, float), np.asarray(values, float))
        for step, kind in sorted(marks[:50], key=lambda mark: mark[1] == "retrain"):  # orange is on top
            axes.axvline(step, color=colour(1 if kind == "retrain" else 4), linewidth=0.8, linestyle="--")
        if chart.log and all(min(values) > 0 for _, _, values in lines):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        elif chart.unit.startswith("%"):
            axes.set_ylim(-2, max(10, 1.1 * axes.get_ylim()[1]))
        axes.set_xlabel("step")
        axes.set_ylabel(chart.unit)
        legend(canvas)
        return True

    return draw_chart(chart.title, paint, (4.8, 2.6 + 0.19 * len(lines)))


def _drawable(values: Any) -> Any:
    return np.abs(values) < MOST


def _line(canvas: Canvas, number: int, label: str, steps: Any, values: Any) -> None:
    """Plot the means of at most `POINTS` parts over the range of each; skip values that are not finite."""
    available = _drawable(values)
    parts = min(POINTS, int(available.sum()))
    groups = [np.array_split(array[available], parts) for array in (steps, values)]
    middle = [group.mean() for group in groups[0]]
    if parts < available.sum():
        low, high = ([limit(group) for group in groups[1]] for limit in (np.min, np.max))
        canvas.axes.fill_between(middle, low, high, color=colour(number), alpha=0.15, linewidth=0)
    canvas.line(number, middle, [group.mean() for group in groups[1]], label, marker="." if parts == 1 else None)


def load() -> dict[str, object]:
    """Return the dashboard, ready to be imported in Grafana (Dashboards, New, Import)."""
    text = (files("deqcore.monitor") / "grafana.json").read_text(encoding="utf-8")
    results: dict[str, object] = json.loads(text)
    return results
