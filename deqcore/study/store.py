"""Results on disk: every write is atomic, so that a process may be killed at any moment.

- study.json: format, versions, settings, machine
- cells/KEY/cell.json: what to train
- cells/KEY/progress.safetensors: weights, optimiser and history after the latest epoch
- cells/KEY/result.json: its result, or the reason of its failure
- results.json, results.csv, results.md, report.html
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from deqcore.errors import ConfigError, DeqcoreError
from deqcore.study.grid import FORMAT, Cell
from deqcore.study.models.base import Weights


class StudyError(DeqcoreError, RuntimeError):
    """A directory of results cannot be used: locked, of another version, or of another study."""


LOCK: Final = ".lock"
PACKAGES: Final = ("torch", "jax", "jaxlib", "optax", "scipy", "scikit-learn")
"""Distributions whose versions belong to the description of a machine."""


def write(path: Path, content: bytes) -> None:
    """Replace a file as a whole, or not at all.

    Raises:
        StudyError: the disk is full or the place cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StudyError(
            f"{str(path)!r} cannot be written: {error.strerror}. What was finished before is kept: make room, then "
            f"start the same study again to continue."
        ) from error


def write_json(path: Path, value: object) -> None:
    """Write JSON that any reader takes: NaN and infinity are errors, not tokens."""
    write(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; None if the file does not exist."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write_progress(folder: Path, tensors: Weights, history: Mapping[str, object]) -> None:
    """Save weights and history in one file, so that they always belong together."""
    from safetensors.numpy import save

    write(folder / "progress.safetensors", save(tensors, {"history": json.dumps(history, allow_nan=False)}))


def read_progress(folder: Path) -> tuple[Weights, dict[str, Any]] | None:
    """Return what `write_progress` saved last; None if it never did."""
    from safetensors import safe_open

    path = folder / "progress.safetensors"
    if not path.exists():
        return None
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return tensors, json.loads(file.metadata()["history"])


class Store:
    """The directory of one study."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, cell: Cell) -> Path:
        """Return where a cell's files are."""
        return self.root / "cells" / cell.key

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Return the result of a cell; None while it is unfinished."""
        results: dict[str, Any] | None = read_json(self.folder(cell) / "result.json")
        return results

    def epochs(self, cell: Cell) -> int:
        """Return the epochs of a cell that need not be done again."""
        if self.result(cell) is not None:
            return cell.epochs
        result = read_progress(self.folder(cell))
        return 0 if result is None else int(result[1]["epochs"])

    def about(self) -> dict[str, Any]:
        """Return what `open` stored; empty before."""
        return dict(read_json(self.root / "study.json") or {})

    def open(self, about: dict[str, object]) -> None:
        """Start a study here, or check that it may continue.

        Args:
            about: what is stored in `study.json`.

        Raises:
            StudyError: the results here are of another format, or of another version of deqcore.
        """
        from deqcore import __version__

        own = {"format": FORMAT, "deqcore": __version__}
        result = read_json(self.root / "study.json")
        if result is not None:
            theirs = {name: result.get(name) for name in own}
            if theirs != own:
                raise StudyError(
                    f"{str(self.root)!r} holds results of deqcore {theirs['deqcore']} (format {theirs['format']}), "
                    f"but this is {__version__} (format {FORMAT}), and numbers of two versions do not compare. "
                    f"Choose another directory with --out, or remove this one."
                )
        elif self.root.exists() and any(item.name != LOCK for item in self.root.iterdir()):
            raise StudyError(
                f"{str(self.root)!r} is not empty and holds no study (study.json is missing). Choose another "
                f"directory with --out."
            )
        write_json(self.root / "study.json", own | about)

    def resume(self, cells: Iterable[Cell], *, retry: bool) -> int:
        """Count the finished cells.

        Args:
            cells: the whole grid.
            retry: forget the results of those that failed.
        """
        done = 0
        for cell in cells:
            result = self.result(cell)
            if result is not None and result["status"] != "ok" and retry:
                (self.folder(cell) / "result.json").unlink()
                result = None
            done += result is not None
        return done

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep every other study out while this one runs; a killed process leaves no lock behind.

        Raises:
            StudyError: another study runs here.
        """
        with locked(self.root / LOCK, f"Another study runs in {str(self.root)!r}"):
            yield


@contextmanager
def locked(path: Path, refusal: str, wait: float = 0.0) -> Iterator[None]:
    """Hold a file's lock.

    Args:
        path: of the file; made if need be.
        refusal: how the error starts.
        wait: seconds to wait for another process to let go.

    Raises:
        StudyError: another process holds it.
        ConfigError: the place cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=wait)
        lock.acquire()
    except Timeout:
        raise StudyError(f"{refusal}. Wait for it, or choose another directory with --out.") from None
    except OSError as error:
        raise ConfigError(f"--out: {str(path.parent)!r} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        lock.release()
