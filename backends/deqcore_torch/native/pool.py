"""Run a kernel: one process at a time compiles it, and its samples are split over torch's number of threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from filelock import FileLock

WORTH: Final = 2**21
"""Numbers to read above which a second thread pays off: after a product of f the other cores belong to torch's own
threads, which wait actively for more work, so that a thread that is called to help starts late."""

_compiled: set[tuple[Any, Any]] = set()
_compiling = threading.Lock()


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Return the threads of this process, because threads do not survive a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix="deqcore")


def run(kernel: Callable[..., Any], batch: int, numbers: int, *arguments: Any) -> None:
    """Call `kernel(*arguments, start, stop)` on all of `batch` samples, which together read `numbers` numbers.

    The first argument is the array whose dtype the kernel is compiled for.
    """
    if (kernel, arguments[0].dtype) not in _compiled:
        _compile(kernel, *arguments)
    threads = min(torch.get_num_threads(), batch, max(1, numbers // WORTH))
    if threads <= 1:
        kernel(*arguments, 0, batch)
        return
    cuts = [batch * i // threads for i in range(threads + 1)]
    pool = _pool(torch.get_num_threads(), os.getpid())
    others = [pool.submit(kernel, *arguments, a, b) for a, b in pairwise(cuts[1:])]
    kernel(*arguments, 0, cuts[1])
    for other in others:
        other.result()


def _compile(kernel: Any, *arguments: Any) -> None:
    """Make the first call, on no sample, while no other process writes to the cache.

    Numba's cache is not safe against concurrent writes: two processes that compile for different dtypes at once may
    give their files one name, so that the code for one dtype is loaded for the other.
    """
    folder = Path(kernel.stats.cache_path)
    folder.mkdir(parents=True, exist_ok=True)
    with _compiling, FileLock(folder / "deqcore-native.lock"):
        kernel(*arguments, 0, 0)
    _compiled.add((kernel, arguments[0].dtype))
