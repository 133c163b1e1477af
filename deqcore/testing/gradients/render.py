"""Reports of the gradient check as tables and as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from deqcore.testing.gradients.compare import Comparison
from deqcore.testing.gradients.sweep import GradientReport, GradientRun

SHORT: Final = {"float64": "f64", "float32": "f32"}
LISTED: Final = 12  # failures that are described; JSON has all


def as_json(report: GradientReport, seconds: float) -> dict[str, object]:
    """Return everything in the report as plain values."""
    return {
        "ok": report.ok,
        "seconds": round(seconds, 2),
        "comparisons": [asdict(comparison) | {"ok": comparison.ok} for comparison in report.comparisons],
        "errors": [_run(run) for run in report.errors],
        "skipped": [_run(run) for run in report.runs if run.skipped],
        "spread": dict(report.spread),
    }


def _run(run: GradientRun) -> dict[str, object]:
    job = run.job
    return {
        "backend": run.backend,
        "kind": job.kind,
        "problem": job.problem,
        "dtype": job.dtype,
        "solver": job.solver,
        "strategy": job.strategy,
        "message": run.error,
    }


def matrix(report: GradientReport, seconds: float) -> RenderableType:
    """Return one line per solver and strategy, one column per backend and dtype."""
    columns = list(dict.fromkeys((item.backend, item.job.dtype) for item in report.runs if not item.job.jitter))
    columns.sort(key=lambda column: (column[0], SHORT.get(column[1], column[1]) != "f64"))
    table = Table("solver", "strategy", "against", box=box.SIMPLE_HEAD, pad_edge=False)
    for backend, dtype in columns:
        table.add_column(f"{backend} {SHORT.get(dtype, dtype)}", justify="right")
    pairs = dict.fromkeys((run.job.solver, run.job.strategy) for run in report.runs)
    for solver, strategy in pairs:
        own = [
            comparison
            for comparison in report.comparisons
            if (comparison.solver, comparison.strategy) == (solver, strategy)
        ]
        exact = any(item.against == "truth" for item in own)
        against = "truth" if exact else next((item.against for item in own), "–")
        cells = [_cell(report, own, solver, strategy, backend, dtype) for backend, dtype in columns]
        table.add_row(solver, strategy, against, *cells)
    return Group(table, *_failures(report), _summary(report, seconds))


def _cell(
    report: GradientReport, comparisons: Sequence[Comparison], solver: str, strategy: str, backend: str, dtype: str
) -> Text:
    runs = [
        run
        for run in report.runs
        if (run.backend, run.job.dtype, run.job.solver, run.job.strategy) == (backend, dtype, solver, strategy)
    ]
    if any(run.error and not run.skipped for run in runs):
        return Text("error", style="bold red")
    result = [item for item in comparisons if (item.backend, item.dtype) == (backend, dtype)]
    if result:
        worst = max(item.relative for item in result)
        good = all(item.ok for item in result)
        return Text(f"{'✓' if good else '✗'} {worst:.0e}", style="green" if good else "bold red")
    return Text("left out" if any(run.skipped for run in runs) else "reference" if runs else "–", style="dim")


def _failures(report: GradientReport) -> Iterable[Text]:
    bad = [comparison for comparison in report.comparisons if not comparison.ok]
    for run in report.errors[:LISTED]:
        job = run.job
        yield Text(
            f"✗ {run.backend} {job.dtype}, {job.solver} × {job.strategy} on {job.problem}: {run.error}", style="red"
        )
    for item in bad[:LISTED]:
        yield Text(f"✗ {describe(item)}", style="red")
    more = len(bad) + len(report.errors) - min(len(bad), LISTED) - min(len(report.errors), LISTED)
    if more:
        yield Text(f"… and {more} more (--json lists them all)", style="red")


def describe(comparison: Comparison) -> str:
    """Describe a disagreement."""
    c = comparison
    return (
        f"{c.backend} {c.dtype}, {c.solver} × {c.strategy} on {c.problem}: {c.quantity} differs from {c.against} by "
        f"{c.relative:.1e} relative ({c.error:.1e}, bound {c.bound:.1e}); cosine {c.cosine:.6f}; {c.place}"
    )


def _summary(report: GradientReport, seconds: float) -> Text:
    bad = sum(not comparison.ok for comparison in report.comparisons) + len(report.errors)
    share = max((comparison.share for comparison in report.comparisons), default=0.0)
    text = Text()
    if bad:
        text.append(f"{bad} of {len(report.comparisons) + len(report.errors)} checks failed", style="bold red")
    elif not report.comparisons:
        text.append("Nothing was compared", style="bold red")
        text.append(": a problem without a known solution needs two backends, solvers or strategies to compare")
    else:
        text.append(f"{len(report.comparisons)} comparisons agree", style="bold green")
        text.append(f", the worst at {share:.0%} of its bound")
    text.append(f" ({seconds:.0f} s).")
    noisy = {name: value for name, value in report.spread.items() if value > 1e-3}
    for name, value in noisy.items():
        text.append(
            f"\n{name}: one unit in the last place of the data moves this gradient by {value:.0e}.", style="yellow"
        )
    return text


def leaves(report: GradientReport, seconds: float) -> RenderableType:
    """Return one line per quantity of a user's own problem, and the first place of disagreement."""
    table = Table(
        *("backend", "dtype", "solver", "quantity", "against", "relative error", "allowed", "cosine", "verdict"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for comparison in report.comparisons:
        allowed = f"{comparison.relative * comparison.bound / comparison.error:.1e}" if comparison.error else ""
        verdict = Text("ok", style="green") if comparison.ok else Text("differs", style="bold red")
        table.add_row(
            *(comparison.backend, comparison.dtype, comparison.solver, comparison.quantity, comparison.against),
            *(f"{comparison.relative:.1e}", allowed, f"{comparison.cosine:.8f}"),
            verdict,
        )
    lines = [Text(f"✗ {line}", style="red") for line in complaints(report)]
    return Group(table, *lines, _summary(report, seconds))


def complaints(report: GradientReport) -> list[str]:
    """Return what is wrong with a user's own problem, a line each: errors, then first disagreements."""
    lines = [f"{run.backend}, {run.job.dtype}: {run.error}" for run in _distinct(report.errors)]
    result = first_disagreements(report).items()
    return lines + [
        f"First disagreement of {key}: {comparison.quantity}. {_why(comparison)}" for key, comparison in result
    ]


def _why(comparison: Comparison) -> str:
    c = comparison
    return (
        f"{c.place}. The difference of {c.error:.1e} is more than {c.dtype}, the tolerance and the condition "
        f"of I − J explain ({c.bound:.1e}): the two compute different things."
    )


def first_disagreements(report: GradientReport) -> dict[str, Comparison]:
    """Find the first quantity that differs for each pair of results, in the order in which errors propagate."""
    results: dict[str, Comparison] = {}
    for comparison in report.comparisons:
        if not comparison.ok:
            results.setdefault(
                f"{comparison.backend} {comparison.dtype} ({comparison.solver}) with {comparison.against}", comparison
            )
    return results


def _distinct(runs: Sequence[GradientRun]) -> list[GradientRun]:
    unique: Mapping[tuple[str, str, str], GradientRun] = {(run.backend, run.job.dtype, run.error): run for run in runs}
    return list(unique.values())


def console() -> Any:
    """Return the console for tables: as wide as the terminal or COLUMNS, and wide without either."""
    made = Console()
    return made if made.is_terminal or "COLUMNS" in os.environ else Console(width=200)
