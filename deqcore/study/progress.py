"""The live view in the terminal: one bar for the study, one for each cell in training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from deqcore.study.grid import Cell


class ProgressView:
    """Bars on a terminal; elsewhere one line for each cell that ends.

    Args:
        console: where to write.
        cells: the whole grid.
        done: how many of them had a result before.
    """

    def __init__(self, console: Console, cells: Sequence[Cell], done: int) -> None:
        self.console = console
        self.total = len(cells)
        self.done = done
        self.width = max((len(cell.label) for cell in cells), default=0)
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=18),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", style="dim"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.starts: dict[str, float] = {}

    def __enter__(self) -> ProgressView:
        self.bars.start()
        self.whole = self.bars.add_task(
            "study".ljust(self.width), total=self.total, completed=self.done, detail="cells"
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bars.stop()

    def started(self, cell: Cell) -> None:
        """Show a bar for the cell."""
        self.starts[cell.key] = time.monotonic()
        label = escape(cell.label.ljust(self.width))
        self.tasks[cell.key] = self.bars.add_task(label, total=None, detail="starting")

    def progressed(self, cell: Cell, progress: dict[str, Any]) -> None:
        """Move its bar."""
        detail = [f"epoch {progress['epoch']}", f"loss {progress['loss']:.4f}"]
        if progress["residual"] is not None:
            detail.append(f"residual {progress['residual']:.1e}")
        detail.append(f"f {progress['evaluations']}")
        if progress["vjps"] is not None:
            detail.append(f"vjps {progress['vjps']}")
        self.bars.update(
            self.tasks[cell.key], completed=progress["step"], total=progress["steps"], detail=" ".join(detail)
        )

    def ended(self, cell: Cell, result: dict[str, Any]) -> None:
        """Replace its bar by a line that stays."""
        self.bars.remove_task(self.tasks.pop(cell.key))
        self.bars.advance(self.whole)
        self.done += 1
        seconds = f"{time.monotonic() - self.starts[cell.key]:.0f} s"
        if result["status"] == "ok":
            detail = f"[green]test accuracy {100 * result['test_accuracy']:.2f} %[/]"
            steps = result["times"]["training"]
            seconds += "" if steps is None else f", {steps:.3g} s of it in training steps"
        else:
            detail = f"[red]{escape(result['reason'])}: {escape(result['detail'])}[/]"
        label = escape(cell.label.ljust(self.width))
        self.console.print(f"{self.done:>3}/{self.total}  {label}  {detail}  [dim]{seconds}[/]", soft_wrap=True)
