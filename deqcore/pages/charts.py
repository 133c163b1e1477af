"""Charts as SVG inside a page: they follow its colours, light and dark, and show values where the pointer is."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from html import escape
from typing import Any, Final

import numpy as np

from deqcore.solve.user_line import warn

INK: Final = "#010203"
LINE: Final = "#040506"
SERIES: Final = tuple(f"#0a0b{number:02x}" for number in range(8))
"""Stand-ins for the variables of the style sheet, which matplotlib does not know: --ink, --line, --s0 to --s7."""

DASHES: Final = ("-", "--", ":", "-.")
MARKS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")
JAPANESE: Final = (
    *("Noto Sans CJK JP", "Noto Sans JP", "Source Han Sans JP", "Hiragino Sans", "Yu Gothic", "Meiryo", "MS Gothic"),
    *("IPAexGothic", "IPAPGothic", "IPAGothic", "TakaoPGothic", "VL PGothic"),
)
"""Families with Japanese glyphs, of which charts use the first that is installed."""

MISSING: Final = "missing from"  # matplotlib's words about a glyph that no font has
_warned: list[bool] = []
TIPS: Final = 60
"""Points of one line that show their values; more would make a page of a long log heavy."""


@dataclass
class Canvas:
    """The axes of a chart and the points that show values.

    Attributes:
        axes: matplotlib's.
        tips: x, y in data coordinates, and the text.
    """

    axes: Any
    tips: list[tuple[float, float, str]] = field(default_factory=list)

    def tip(self, x: float, y: float, text: str) -> None:
        """Show a text near a point; one that is not finite has no place."""
        if np.isfinite(x) and np.isfinite(y):
            self.tips.append((float(x), float(y), text))

    def line(self, number: int, x: Any, y: Any, label: str, *, listed: bool = True, **style: Any) -> None:
        """Draw a line whose points show `label` and their value.

        Args:
            number: chooses colour and dashes.
            x: `(points,)`.
            y: `(points,)`.
            label: for the legend, and above each value.
            listed: whether the legend has it.
            style: of matplotlib, instead of the chosen one.
        """
        dashes = DASHES[number // len(SERIES) % len(DASHES)]
        # matplotlib leaves labels out of a legend that begin with an underscore.
        own = {"color": colour(number), "ls": dashes, "lw": 1.5, "label": "\u200b" + label if listed else None}
        self.axes.plot(x, y, **(own | style))
        for index in np.unique(np.linspace(0, len(x) - 1, min(TIPS, len(x))).astype(int)) if len(x) else ():
            self.tip(x[index], y[index], f"{label}\n{x[index]:.4g}: {y[index]:.4g}")


def colour(number: int) -> str:
    """Return the colour of a series; colours return with other dashes and marks."""
    return SERIES[number % len(SERIES)]


def mark(number: int) -> str:
    """Return the mark of a series: different for series of one colour."""
    return MARKS[(number + number // len(SERIES)) % len(MARKS)]


def draw(salt: str, paint: Callable[[Canvas], bool], size: tuple[float, float] = (4.8, 3.2)) -> str:
    """Return the SVG, or "" if there is nothing to draw.

    Args:
        salt: keeps the ids of several charts in one page apart.
        paint: draws on the canvas; returns whether there was anything.
        size: inches.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_style(salt)), _warn_of_missing_glyphs():
        figure = Figure(figsize=size, layout="constrained", dpi=72)
        figure.patch.set_alpha(0.0)
        canvas = Canvas(figure.subplots())
        canvas.axes.patch.set_alpha(0.0)
        canvas.axes.grid(color=LINE)
        canvas.axes.set_axisbelow(True)
        canvas.axes.spines[["top", "right"]].set_visible(False)
        if not paint(canvas):
            return ""
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, dpi=72)
    return _finished(out.getvalue(), canvas, size[1] * 72)


def legend(canvas: Canvas, columns: int = 1) -> None:
    """Put the legend below the chart, where it covers nothing, however long it is."""
    canvas.axes.figure.legend(loc="outside lower left", frameon=False, fontsize=8.5, ncols=columns)


@cache
def fonts() -> tuple[str, ...]:
    """Return the families of charts: the default one, then installed ones with the glyphs that it lacks."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return "sans-serif", *[family for family in JAPANESE if family in installed][:1]


@contextmanager
def _warn_of_missing_glyphs() -> Iterator[None]:
    """Warn once in a process about text without a font, instead of once for each glyph."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    missing = [warning for warning in caught if MISSING in str(warning.message)]
    for warning in caught:
        if warning not in missing:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if missing and not _warned:
        _warned.append(True)
        warn(
            "No installed font has all characters of the charts' labels, so the space that they take is an estimate "
            "and a reader needs a font of their own to see them. For Japanese install one of: "
            f"{', '.join(JAPANESE)} (Debian: apt install fonts-noto-cjk), and render the report again.",
            UserWarning,
        )


def _style(salt: str) -> Any:
    # Text stays text: small, searchable, and in the reader's own font.
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "font.size": 9.5,
        "font.family": list(fonts()),
        "grid.linewidth": 0.7,
        **dict.fromkeys(inked, INK),
    }


def _finished(svg: str, canvas: Canvas, height: float) -> str:
    svg = svg[svg.index("<svg") :].replace(INK, "var(--ink)").replace(LINE, "var(--line)")
    for number, stand_in in enumerate(SERIES):
        svg = svg.replace(stand_in, f"var(--s{number})")
    points = canvas.axes.transData.transform([tip[:2] for tip in canvas.tips]) if canvas.tips else []
    drawn = "".join(
        f'<circle class="tip" cx="{x:.1f}" cy="{height - y:.1f}" r="7"><title>{escape(text)}</title></circle>'
        for (x, y), (_, _, text) in zip(points, canvas.tips, strict=True)
    )
    return svg[: svg.rindex("</svg>")] + drawn + "</svg>"
