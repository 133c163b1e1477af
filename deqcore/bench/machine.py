"""The machine of a measurement, and the share of it that other processes used."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Final

from deqcore.errors import ConfigError

PROC: Final = Path("/proc")
POOLS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def describe(packages: Iterable[str] = ()) -> dict[str, object]:
    """Return the machine and the software on it, as plain values.

    Args:
        packages: distributions whose versions belong to the result; those that are not installed are left out.
    """
    result: dict[str, str] = {}
    for name in ("deqcore", "numpy", *packages):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_gib": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": result,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "load_before": [round(number, 2) for number in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def usable_cores() -> int:
    """Return the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(threads: int) -> int:
    """Refuse more threads than there are cores to use; returns how many there are."""
    cores = usable_cores()
    if not 1 <= threads <= cores:
        raise ConfigError.bad_value("bench", "--threads", threads, f"a number from 1 to {cores}, the usable cores")
    return cores


def limit_threads(threads: int) -> None:
    """Let this process use so many threads. To be called before NumPy or a framework is imported.

    Thread pools read the environment or count the processors that they may use, so both are set. The limit cannot be
    undone.

    Args:
        threads: at least 1, at most `usable_cores()`.
    """
    cores = check_threads(threads)
    os.environ.update(dict.fromkeys(POOLS, str(threads)))
    if threads < cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def _cpu() -> str:
    for line in _lines(PROC / "cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> float | None:
    for line in _lines(PROC / "meminfo"):
        if line.startswith("MemTotal"):
            return round(int(line.split()[1]) / 2**20, 1)
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


class Bystanders:
    """Context manager: which share of the machine's processor time other processes used inside it.

    Attributes:
        share: of all cores, 0 to 1, once the block is left; NaN if the system does not report it.
    """

    def __init__(self) -> None:
        self.share = float("nan")

    def __enter__(self) -> Bystanders:
        self._busy = _busy_seconds()
        self._own = time.process_time()
        self._clock = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return
        elapsed = time.perf_counter() - self._clock
        others = busy - self._busy - (time.process_time() - self._own)
        self.share = max(0.0, others / (elapsed * (os.cpu_count() or 1)))


def _busy_seconds() -> float | None:
    """Return the processor seconds of the whole machine that were not idle, time stolen by its host included."""
    lines = _lines(PROC / "stat")
    if not lines:
        return None
    user, nice, system, _, _, irq, softirq, steal = (int(word) for word in lines[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def peak_memory(task: Callable[[], object]) -> int | None:
    """Return bytes by which the process's resident memory grew while `task` ran; None if the system does not report it.

    What the allocator had kept from earlier work is given back first, so that it is not taken for free.
    """
    gc.collect()
    _trim()
    try:
        (PROC / "self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    before = _status("VmRSS")
    task()
    peak = _status("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def give_back_blocks(least: int = 2**16) -> None:
    """Make glibc return free blocks of at least `least` bytes at once, so that memory peaks are exact.

    Allocation becomes slower: do not time anything afterwards.
    """
    try:
        ctypes.CDLL(None).mallopt(-3, least)  # M_MMAP_THRESHOLD; setting it also stops its growth
    except (OSError, AttributeError):  # not glibc
        return


def _trim() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return


def _status(key: str) -> int | None:
    for line in _lines(PROC / "self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return None
