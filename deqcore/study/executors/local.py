"""Run the cells of a study, each in its own process, and continue if one of them fails."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from deqcore.study import store
from deqcore.study.executors import worker
from deqcore.study.grid import Cell
from deqcore.study.store import Store, StudyError

LOG: Final = "worker.log"
GPU: Final = {  # allocate memory on demand, since other processes train there too; do not round float32 to 10 bits
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "NVIDIA_TF32_OVERRIDE": "0",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
}


class CellObserver(Protocol):
    """Observes the progress of a study, such as the terminal does."""

    def started(self, cell: Cell) -> None:
        """Report that the process of a cell has started."""

    def progressed(self, cell: Cell, progress: dict[str, Any]) -> None:
        """Report that a cell has taken some steps."""

    def ended(self, cell: Cell, result: dict[str, Any]) -> None:
        """Report that a cell has a result."""


EventQueue: TypeAlias = "queue.Queue[tuple[Process, dict[str, Any] | None]]"


class Process:
    """One cell's process, and a thread that reads its progress.

    Args:
        cell: what it works on.
        folder: where.
        events: gets its lines of progress, and None when it has ended.
        measured: only time this number of steps instead of training.
    """

    def __init__(self, cell: Cell, folder: Path, events: EventQueue, measured: int = 0) -> None:
        self.cell, self.folder = cell, folder
        store.write_json(folder / "cell.json", cell.as_dict())
        with (folder / LOG).open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "deqcore.study.executors.worker", str(folder), str(measured)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(cell.training.threads),
            )
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    def _read(self, events: EventQueue) -> None:
        with self.popen:  # closes the pipes
            assert self.popen.stdout is not None
            for line in self.popen.stdout:
                try:
                    events.put((self, json.loads(line)))
                except ValueError:
                    continue  # the user's own code may print
            # The end of its standard input would end the process: that stays open until it has ended by itself.
            self.popen.wait()
        events.put((self, None))

    def said(self) -> str:
        """Return the last line that it wrote to its standard error."""
        text = (self.folder / LOG).read_text(errors="replace").strip()
        return text.splitlines()[-1] if text else "it wrote no message"

    def result(self) -> dict[str, Any]:
        """Return the result of the ended process.

        Raises:
            StudyError: it could not write.
        """
        results: dict[str, Any] | None = store.read_json(self.folder / "result.json")
        if results is not None:
            return results
        last = self.said()
        code = self.popen.returncode
        if last.startswith("Error: "):
            raise StudyError(f"{self.cell.label}: {last.removeprefix('Error: ')}")
        if code == -signal.SIGKILL:
            reason, detail = "killed", "the process was killed from outside; the system does that when memory runs out"
        elif code < 0:
            reason, detail = "crashed", f"the process ended with {signal.Signals(-code).name}: {last}"
        else:
            reason, detail = "crashed", f"the process ended with code {code}: {last}"
        worker.failed(self.cell, reason, detail, self.folder)
        return dict(store.read_json(self.folder / "result.json"))

    def kill(self) -> None:
        """End it at once; what it finished is on disk."""
        self.popen.kill()
        self.popen.wait()


def run(place: Store, cells: Sequence[Cell], watcher: CellObserver, jobs: int = 1) -> list[dict[str, Any]]:
    """Train every cell that has no result yet.

    Args:
        place: where results are.
        cells: the whole grid.
        watcher: observes the cells.
        jobs: processes at a time.

    Returns:
        The results, in the order of the cells.

    Raises:
        StudyError: results cannot be written.
    """
    events: EventQueue = queue.Queue()
    waiting = [cell for cell in cells if place.result(cell) is None]
    running: list[Process] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running.append(Process(cell, place.folder(cell), events))
                watcher.started(cell)
            process, progress = events.get()
            if progress is not None:
                watcher.progressed(process.cell, progress)
                continue
            running.remove(process)
            watcher.ended(process.cell, process.result())
    finally:
        for process in running:
            process.kill()
    return [dict(place.result(cell) or {}) for cell in cells]


def measure(place: Store, cell: Cell, steps: int) -> dict[str, Any]:
    """Time a cell's steps in its own process, while no other cell runs.

    Raises:
        StudyError: the process came to nothing.
    """
    events: EventQueue = queue.Queue()
    process = Process(cell, place.folder(cell), events, measured=steps)
    times: dict[str, Any] = {}
    while (line := events.get()[1]) is not None:
        times = line
    if process.popen.returncode or "times" not in times:
        raise StudyError(f"{cell.label} could not be timed: {process.said().removeprefix('Error: ')}")
    return times


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a worker: the study's number of threads for every library, and `GPU`."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    limits = dict.fromkeys(names, str(threads))
    limits |= {name: os.environ.get(name, value) for name, value in GPU.items()}
    if threads == 1:
        flag = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        limits["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    return {**os.environ, **limits}
