"""Run a kernel: one process at a time compiles it, and torch's number of threads works on its samples."""

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

from deqcore_torch.native import openmp
from deqcore_torch.native.entry import entry

WORTH: Final = 2**16
"""Numbers to read above which another of torch's threads pays off: it starts within microseconds."""

WORTH_APART: Final = 2**21
"""The same for a thread of our own: after a product of f the other cores belong to torch's threads, which wait actively
for more work, so that a thread that is called to help starts late."""

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
    call, parallel = entry(kernel), openmp.parallel()
    threads = min(torch.get_num_threads(), batch, numbers // (WORTH if parallel else WORTH_APART))
    if threads <= 1:
        call(0, 0, batch, 1, *arguments)
    elif parallel:
        call(parallel, 0, batch, threads, *arguments)
    else:
        _apart(call, batch, threads, *arguments)


def _apart(call: Callable[..., None], batch: int, threads: int, *arguments: Any) -> None:
    """Work in threads of our own."""
    cuts = [batch * i // threads for i in range(threads + 1)]
    pool = _pool(torch.get_num_threads(), os.getpid())
    others = [pool.submit(call, 0, a, b, 1, *arguments) for a, b in pairwise(cuts[1:])]
    call(0, 0, cuts[1], 1, *arguments)
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
        entry(kernel)(0, 0, 0, 1, *arguments)
    _compiled.add((kernel, arguments[0].dtype))
