"""Worker processes, two at a time, and never two different heavy frameworks at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deqcore import plugins
from deqcore.errors import BackendError, MissingFrameworkError

SLOTS: Final = 2
TIMEOUT: Final = 3600.0  # compiling takes minutes on a busy machine; this ends what hangs


@dataclass(frozen=True)
class WorkerTask:
    """A folder of jobs for one backend in one dtype."""

    folder: Path
    backend: str
    dtype: str


def environment(dtype: str) -> dict[str, str]:
    """Return one thread each, and double precision where a framework has it behind a switch."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    switches = {"JAX_ENABLE_X64": "1" if dtype == "float64" else "0"}
    return {**os.environ, **threads, **switches}


def run_all(tasks: Sequence[WorkerTask], tell: Callable[[str], None] = lambda _: None) -> dict[WorkerTask, str]:
    """Run the worker for each task.

    Args:
        tasks: what to run.
        tell: takes a line of text whenever a process starts or ends.

    Returns:
        For each task what went wrong with its process, or "".
    """
    waiting = sorted(tasks, key=lambda task: (_framework(task) or "", task.dtype))
    running: dict[WorkerTask, tuple[subprocess.Popen[bytes], float]] = {}
    ended: dict[WorkerTask, str] = {}
    try:
        while waiting or running:
            for task in [task for task in waiting if len(running) < SLOTS and _fits(task, running)]:
                if len(running) < SLOTS and _fits(task, running):
                    waiting.remove(task)
                    running[task] = (_start(task), time.monotonic())
                    tell(f"{task.backend} {task.dtype} …")
            for task, (process, start) in list(running.items()):
                late = time.monotonic() - start > TIMEOUT
                if process.poll() is None and not late:
                    continue
                if late:
                    _end(process)
                del running[task]
                ended[task] = f"no answer within {TIMEOUT:.0f} s" if late else _outcome(task, process)
                tell(f"{task.backend} {task.dtype}: {time.monotonic() - start:.1f} s")
            time.sleep(0.02)
    finally:
        for process, _ in running.values():
            _end(process)
    return ended


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _framework(task: WorkerTask) -> str | None:
    return plugins.backends()[task.backend].package


def _fits(task: WorkerTask, running: dict[WorkerTask, tuple[subprocess.Popen[bytes], float]]) -> bool:
    heavy = {name for other in running if (name := _framework(other))}
    return not heavy or _framework(task) in (None, *heavy)


def _start(task: WorkerTask) -> subprocess.Popen[bytes]:
    with (task.folder / "stderr.txt").open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "deqcore.testing.worker", str(task.folder)],
            env=environment(task.dtype),
            stdout=errors,
            stderr=errors,
        )


def _outcome(task: WorkerTask, process: subprocess.Popen[bytes]) -> str:
    if process.returncode == 0 and (task.folder / "results.json").is_file():
        return ""
    lines = (task.folder / "stderr.txt").read_text(errors="replace").strip().splitlines()
    return f"the worker ended with code {process.returncode}: {lines[-1] if lines else 'no message'}"


def installed(names: Sequence[str]) -> tuple[str, ...]:
    """Return the named backends whose frameworks are installed; without names, all such backends.

    Raises:
        UnknownNameError: a name is not registered.
        MissingFrameworkError: a named one is not installed.
        BackendError: none is left.
    """
    for name in names:
        spec = plugins.spec("backend", name)
        if isinstance(spec, plugins.BackendSpec) and not _is_there(spec):
            raise MissingFrameworkError.of(name, str(spec.package), spec.extra)
    result = tuple(names) or tuple(name for name, spec in plugins.backends().items() if _is_there(spec))
    if not result:
        raise BackendError('No backend is installed: pip install "deqcore[torch]" or "deqcore[jax]".')
    return result


def _is_there(spec: plugins.BackendSpec) -> bool:
    return spec.package is None or plugins.is_installed(spec.package)
