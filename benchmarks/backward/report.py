"""The page, its pictures and its figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from deqcore.bench.report import markdown


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table as Markdown."""
    columns = ("cell", "strategy", "ms", "vjps, slowest sample (mean)", "time / vjps", "largest true error")
    values = [
        (
            f"{row['cell']}, one vjp {row['one vjp']:.2f} ms, parameters {row['parameters']:.2f} ms",
            row["strategy"],
            f"{row['ms']:.1f}",
            f"{row['vjps']} ({row['mean vjps']:.1f})",
            f"{row['overhead']:.2f}",
            f"{row['error']:.1e}",
        )
        for row in rows
    ]
    return markdown([dict(zip(columns, each, strict=True)) for each in values], columns)


FAMILIES: Final = (
    ("exact-ift", "o", "C0"),
    ("broyden-reuse", "o", "C1"),
    ("neumann", "o", "C2"),
    ("jacobian-free", "o", "C3"),
    ("reuse, not certified", "o", "C4"),
    ("plain GMRES", "s", "0.5"),
    ("torchdeq, fixed_point_iter", "^", "C5"),
    ("torchdeq, anderson", "^", "C6"),
    ("torchdeq, broyden", "^", "C9"),
)
"""First words of the strategies' names, with marker and colour."""


def panels(rows: list[dict[str, Any]], target: Path, draw: Callable[[Any, list[dict[str, Any]]], None]) -> None:
    """Draw one panel for each cell, with one legend."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    cells = list(dict.fromkeys(row["cell"] for row in rows))
    columns = -(-len(cells) // 2)
    figure, axes = plt.subplots(2, columns, figsize=(4.2 * columns, 7.5), squeeze=False)
    for axis, cell in zip(axes.flat, cells, strict=False):
        draw(axis, [row for row in rows if row["cell"] == cell])
        axis.set_title(cell, fontsize=9)
    for axis in list(axes.flat)[len(cells) :]:
        axis.axis("off")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=4, fontsize=8)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(target, dpi=110)
    plt.close(figure)


def theirs(row: dict[str, Any]) -> bool:
    """Return whether a row is that of another library."""
    return bool(row["strategy"].startswith("torchdeq"))


def errors(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the error that each strategy reached against its time, and the best of either side."""
    for name, marker, color in FAMILIES:
        family = [row for row in rows if row["strategy"].startswith(name)]
        axis.loglog([r["ms"] for r in family], [r["error"] for r in family], marker, color=color, label=name)
    for peers, style in ((False, "-"), (True, ":")):
        best: list[dict[str, Any]] = []
        for row in sorted((row for row in rows if theirs(row) is peers), key=lambda row: float(row["ms"])):
            if not best or row["error"] < best[-1]["error"]:
                best.append(row)
        label = "best of torchdeq" if peers else "best without torchdeq"
        edge = [row["ms"] for row in best], [row["error"] for row in best]
        axis.step(*edge, style, where="post", color="0.4", zorder=0, label=label)
    axis.set_xlabel("backward pass, ms")
    axis.set_ylabel("largest relative error")


def times(axis: Any, rows: list[dict[str, Any]]) -> None:
    """Draw the time of each strategy over its vjps, and that of the vjps and the parameters alone."""
    for name, marker, color in FAMILIES:
        family = [row for row in rows if row["strategy"].startswith(name) and "preconditioned" not in row["strategy"]]
        axis.plot([r["vjps"] for r in family], [r["ms"] for r in family], marker, color=color, label=name)
    ends = [0, max(row["vjps"] for row in rows)]
    floor = [rows[0]["parameters"] + rows[0]["one vjp"] * k for k in ends]
    axis.plot(ends, floor, "-", color="0.4", zorder=0, label="the vjps and the parameters alone")
    axis.set_xlabel("vjps of the slowest sample")
    axis.set_ylabel("backward pass, ms")


HEAD: Final = """# The backward pass in time

What a backward pass takes beside its vjps, and the error that it reaches.
`python -m benchmarks.backward --folder FOLDER --page` measures, with {threads} threads of torch, and writes this page.

*Plain GMRES* has thirty lines: one projection a step, one stopping test for the whole batch, and no report. Its time
is that of u alone. That of the strategies contains the product with the parameters, which `jacobian-free` shows;
*time / vjps* is without it. *Plain GMRES, as good as certified* takes the fewest vjps with which its largest true error
is at most that of `broyden-reuse` with the target 0.1; only an oracle knows that number. For strategies without a vjp,
*time / vjps* is the time over that of the gradients of the parameters alone. The decisions behind these figures:
[notes](../notes/backward.md).

torchdeq solves the adjoint equation by its hook, with the named solver and tolerance. Its residual is that of the worst
sample, it certifies no error, and each of its steps is a vjp of the whole batch. *Two scales* is the study's model for
images at twice its initial gain.

![Error reached against time](backward-pareto.png)

![Time over the vjps of the slowest sample](backward-vjps.png)

"""


def page(rows: list[dict[str, Any]], threads: int, folder: Path) -> None:
    """Write the page, its plot and its figures."""
    (folder / "backward.md").write_text(HEAD.format(threads=threads) + table(rows) + "\n")
    (folder / "backward.json").write_text(json.dumps(rows, indent=1) + "\n")
    panels(rows, folder / "backward-pareto.png", errors)
    panels(rows, folder / "backward-vjps.png", times)
