"""The report of a log: one HTML page that needs nothing else, not even a network."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from deqcore.errors import MissingExtraError
from deqcore.monitor.charts import draw
from deqcore.monitor.log import Log, series
from deqcore.monitor.metrics import STANDARD
from deqcore.plugins.lookup import is_installed

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
    """The page.

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
    """The answer in one sentence, and its class: "bad", "warn" or "good"."""
    if log.retrain is not None:
        return f"Retrain: {log.retrain.message}", "bad"
    if not log.rows:
        return "The log has no rows: nothing was solved while the monitor ran.", "warn"
    open_triggers: dict[tuple[str, str], str] = {}
    for event in log.events:
        if event.kind == "fired":
            open_triggers[event.metric, event.action] = event.message
        elif event.kind == "cleared":
            open_triggers.pop((event.metric, event.action), None)
    if open_triggers:
        return f"{len(open_triggers)} trigger(s) still on. {next(iter(open_triggers.values()))}", "warn"
    concerns = [tile.title for tile in tiles(log) if tile.concern]
    if concerns:
        return f"No trigger is on, but look at: {', '.join(concerns)}.", "warn"
    return "All quiet: no trigger is on, and the solves do what they should.", "good"


def tiles(log: Log) -> list[Tile]:
    """The numbers of the first screen."""
    latest: dict[str, list[float]] = {}
    for metric, _, _, values in series(log.rows[-max(20, len(log.rows) // 10) :]):
        latest.setdefault(metric, []).extend(values)
    found = []
    for metric, title, limit in TILES:
        if metric in latest:
            value = statistics.median(latest[metric])
            found.append(Tile(title, f"{value:.3g}", limit is not None and value > limit))
    return found


def table(log: Log) -> list[dict[str, str]]:
    """All metrics with their statistics, as text."""
    found = sorted(series(log.rows), key=lambda each: (each[1], ORDER.get(each[0], len(ORDER))))
    return [
        {
            "metric": metric,
            "layer": layer,
            "unit": log.units.get(metric, ""),
            "help": HELP.get(metric, ""),
            "count": str(len(values)),
            **{name: f"{value:.4g}" for name, value in _statistics(values).items()},
        }
        for metric, layer, _, values in found
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
