"""Run the cells of a study on the machines of a Ray cluster.

Each cell is one task. The machine that takes it trains in a process and a folder of its own, exactly as a study on one
machine does, and sends lines of progress and finished files back; only this process writes to the study's directory,
so that no shared disk is needed and a killed study continues from its latest epoch.
"""

from __future__ import annotations

import queue
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from deqcore.errors import MissingExtraError
from deqcore.study import store
from deqcore.study.executors.local import CellObserver, EventQueue, Process
from deqcore.study.grid import Cell
from deqcore.study.store import Store, StudyError

FILES: Final = ("progress.safetensors", "result.json")  # copied between machines; the rest is made there


def train(plain: dict[str, Any], files: dict[str, bytes]) -> Iterator[dict[str, Any]]:
    """Train a cell on this machine.

    Args:
        plain: the cell, as `Cell.as_dict`.
        files: what an earlier try has finished.

    Yields:
        `{"progress": …, "files": …}`: a line of progress or None, and the files that are new since the last one.
    """
    cell = Cell.of(plain)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in files.items():
            store.write(folder / file, content)
        sent = dict(files)
        events: EventQueue = queue.Queue()
        process = Process(cell, folder, events)
        try:
            while (line := events.get()[1]) is not None:
                yield {"progress": line, "files": _news(folder, sent)}
            process.result()
        finally:
            process.kill()
        yield {"progress": None, "files": _news(folder, sent)}


def _news(folder: Path, sent: dict[str, bytes]) -> dict[str, bytes]:
    new = {name: content for name, content in _files(folder).items() if sent.get(name) != content}
    sent.update(new)
    return new


def run(place: Store, cells: Sequence[Cell], watcher: CellObserver) -> list[dict[str, Any]]:
    """Train every cell that has no result yet, as many at a time as the cluster has room for.

    The cluster is the one of `RAY_ADDRESS`, or one that is started on this machine. Its machines need the same deqcore,
    the data at the same paths, and whatever code of the user's own the study names.

    Args:
        place: where results are.
        cells: the whole grid.
        watcher: observes the cells.

    Returns:
        The results, in the order of the cells.

    Raises:
        MissingExtraError: ray is not installed.
        StudyError: a machine was lost, or results cannot be written.
    """
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="error")
    try:
        _run(ray, place, [cell for cell in cells if place.result(cell) is None], watcher)
    finally:
        if started:
            ray.shutdown()
    return [dict(place.result(cell) or {}) for cell in cells]


def _run(ray: Any, place: Store, waiting: Sequence[Cell], watcher: CellObserver) -> None:
    gpu = bool(ray.cluster_resources().get("GPU"))
    tasks: dict[Any, Cell] = {}
    for cell in waiting:
        gpus = int(gpu and cell.device != "cpu")
        remote = ray.remote(num_returns="streaming", num_cpus=cell.training.threads, num_gpus=gpus)(train)
        tasks[remote.remote(cell.as_dict(), _files(place.folder(cell)))] = cell
    begun: set[str] = set()
    while tasks:
        (ready,), _ = ray.wait(list(tasks), num_returns=1)
        cell = tasks[ready]
        try:
            message = ray.get(next(ready))
        except StopIteration:
            del tasks[ready]
            watcher.ended(cell, dict(place.result(cell) or {}))
            continue
        except ray.exceptions.RayError as error:
            raise StudyError(
                f"{cell.label}: the cluster lost it: {error}. What was finished is kept: start the same study again "
                f"to continue."
            ) from error
        if cell.key not in begun:
            begun.add(cell.key)
            watcher.started(cell)
        _take(place.folder(cell), cell, message, watcher)


def _take(folder: Path, cell: Cell, message: dict[str, Any], watcher: CellObserver) -> None:
    store.write_json(folder / "cell.json", cell.as_dict())
    for name, content in message["files"].items():
        store.write(folder / name, content)
    if message["progress"] is not None:
        watcher.progressed(cell, message["progress"])


def _files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingExtraError.of("--executor ray", "ray", "ray") from None
    return ray
