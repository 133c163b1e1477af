"""A process that trains one cell: its peak memory is its own, and when it dies the study lives.

Reads `cell.json` in the folder it is given, writes `result.json` there, and reports progress as JSON lines on stdout.
It ends when its standard input ends, so that no orphan continues to write after the study was killed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from deqcore import plugins
from deqcore.bench.machine import describe
from deqcore.errors import DeqcoreError
from deqcore.study import data, store
from deqcore.study.grid import Cell
from deqcore.study.train.loop import CellFailure, CellTraining, OnProgress

OFTEN: Final = 0.1  # seconds between two lines of progress
HANDOVER: Final = 30.0  # seconds that an orphan of a killed study gets to notice


def train(cell: Cell, folder: Path, tell: OnProgress) -> dict[str, Any]:
    """Train a cell and write its result; what goes wrong is a result too.

    Args:
        cell: what to train.
        folder: where its files are.
        tell: gets progress.
    """
    start, machine = time.perf_counter(), describe(store.PACKAGES)
    try:
        result = _training(cell, folder, tell).run()
    except store.StudyError:
        raise  # the disk: nothing can be written about it either
    except CellFailure as error:
        result = _failed(cell, error.reason, str(error))
    except DeqcoreError as error:
        result = _failed(cell, "error", str(error))
    except MemoryError:
        result = _failed(cell, "out of memory", "the process could not get the memory that it asked for")
    except Exception as error:  # from the framework or the user's code: recorded, and the study continues
        kind = "out of memory" if "out of memory" in str(error).lower() else "error"
        result = _failed(cell, kind, f"{type(error).__name__}: {error}")
    result |= {"seconds": time.perf_counter() - start, "measured": machine}
    store.write_json(folder / "result.json", result)
    return result


def failed(cell: Cell, reason: str, detail: str, folder: Path) -> None:
    """Write the result of a cell whose process could not."""
    store.write_json(folder / "result.json", {**_failed(cell, reason, detail), "seconds": 0.0})


def _training(cell: Cell, folder: Path, tell: OnProgress) -> CellTraining:
    trainer: Any = plugins.load("trainer", _trainer(cell.backend))
    return CellTraining(cell, data.load(cell.data, cell.own.data), trainer, folder, tell)


def _failed(cell: Cell, reason: str, detail: str) -> dict[str, Any]:
    return {"status": "failed", "reason": reason, "detail": detail, "cell": cell.as_dict()}


def _trainer(backend: str) -> str:
    return next(spec.name for spec in plugins.trainers().values() if spec.backend == backend)


class Lines:
    """Progress as JSON lines, not more often than people can read.

    A closed output means that the study was killed. The process ends: an error would be recorded as the cell's result.
    """

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, progress: Mapping[str, object]) -> None:
        """Write one line, or leave it out."""
        now = time.monotonic()
        if now - self._last >= OFTEN or progress["step"] == progress["steps"]:
            self._last = now
            try:
                print(json.dumps(progress), flush=True)
            except BrokenPipeError:
                os._exit(1)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main(folder: Path, measured: int = 0) -> None:
    """Train the cell in `folder`, or only time so many of its steps."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from deqcore.config.project import load_plugins

    load_plugins(lambda error: print(f"Error: {error}", file=sys.stderr))
    cell = Cell.of(store.read_json(folder / "cell.json"))
    with store.locked(folder / store.LOCK, f"Another process trains {folder.name!r}", wait=HANDOVER):
        if measured:
            times = _training(cell, folder, Lines()).measure(measured)
            print(json.dumps({**times, "measured": describe(store.PACKAGES)}), flush=True)
        elif store.read_json(folder / "result.json") is None:
            train(cell, folder, Lines())


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
    except (DeqcoreError, CellFailure) as error:
        sys.exit(f"Error: {error}")
