"""How long a study will take, from steps that were timed here; and times that no neighbour disturbed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

from deqcore.study.executors.local import measure
from deqcore.study.grid import Cell
from deqcore.study.store import Store, StudyError, write_json

PROBES: Final = 3  # steps that an estimate rests on
STEPS: Final = 30  # steps that a time in a report rests on
STARTUP: Final = 5.0  # seconds of a process until it can warm up: the import of a framework, reading the data


def schedule(place: Store, cells: Sequence[Cell], jobs: int) -> tuple[Table, list[str]]:
    """Return the plan as a table, and why cells could not be timed. One cell of each kind, of any seed, is timed.

    Args:
        place: where finished cells are found.
        cells: the whole grid.
        jobs: trainings at a time.
    """
    kinds: dict[str, list[Cell]] = {}
    for cell in cells:
        kinds.setdefault(replace(cell, seed=0).key, []).append(cell)
    table = Table("cell", "seeds", "finished", "estimate", box=box.SIMPLE_HEAD, pad_edge=False)
    total, failed = 0.0, []
    for kind in kinds.values():
        waiting = [cell for cell in kind if place.result(cell) is None]
        try:
            seconds = _estimate(kind[0], len(waiting))
            total, estimate = total + seconds, duration(seconds)
        except StudyError as error:
            failed.append(str(error))
            estimate = "none"
        done = f"{len(kind) - len(waiting)}/{len(kind)}"
        table.add_row(kind[0].label.rpartition(" seed ")[0], str(len(kind)), done, estimate)
    table.add_section()
    table.add_row(f"together, {jobs} at a time", str(len(cells)), "", duration(total / jobs))
    return table, failed


def _estimate(cell: Cell, count: int) -> float:
    """Return the seconds for `count` cells like this one."""
    if not count:
        return 0.0
    with TemporaryDirectory() as folder:
        result = measure(Store(Path(folder)), cell, PROBES)
    # An audit solves two gradients, one of them far below the tolerance, and compiles for it where that is needed.
    audits = cell.training.audits * 5 * result["times"]["step"] + 2 * result["warm_up"]
    return float(count * (STARTUP + result["warm_up"] + result["times"]["training"] + audits))


def timed(
    place: Store, cells: Sequence[Cell], results: Sequence[dict[str, Any]], console: Console
) -> list[dict[str, Any]]:
    """Replace times that were taken while other trainings ran by those of a serial pass.

    Args:
        place: where the cells are.
        cells: the whole grid.
        results: of the cells.
        console: shows progress.
    """
    return [_timed(place, cell, result, console) for cell, result in zip(cells, results, strict=True)]


def _timed(place: Store, cell: Cell, result: dict[str, Any], console: Console) -> dict[str, Any]:
    if result["status"] != "ok" or result.get("serial"):
        return result
    console.print(f"timing {cell.label}", style="dim")
    timed_result = {**result, **measure(place, cell, STEPS), "serial": True}
    write_json(place.folder(cell) / "result.json", timed_result)
    return timed_result


def duration(seconds: float) -> str:
    """Format seconds."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
