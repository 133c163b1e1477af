"""The threads with which torch runs its own operations, where they are those of GNU OpenMP.

They wait actively after each operation of torch, so that they start at once, while a thread of another pool first has
to take a core from them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch


class _Forked:
    """Whether this process is a child of one that had loaded this module: threads do not survive a fork."""

    here = False

    @classmethod
    def begin(cls) -> None:
        """Remember a fork."""
        cls.here = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Forked.begin)


class _Symbol(ctypes.Structure):
    """What `dladdr` knows of an address."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def parallel() -> int:
    """Return the address of `GOMP_parallel`, which calls a function in each of torch's threads.

    It is 0 where torch's threads are not known to be those of GNU OpenMP, or did not survive a fork.
    """
    return 0 if _Forked.here else _found()


@cache
def _found() -> int:
    """Look up the function among the libraries that torch itself is linked with."""
    if not sys.platform.startswith("linux") or not torch.backends.openmp.is_available():
        return 0
    library = Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"
    try:
        own = _address(ctypes.CDLL(str(library), mode=os.RTLD_NOLOAD))
    except OSError:
        return 0
    first = _address(ctypes.CDLL(None))  # that of a library which was loaded in advance takes the place of torch's
    return own if own and first in (0, own) and _file(own).startswith("libgomp") else 0


def _address(library: Any) -> int:
    """Return the address of the function as this library finds it, 0 if it does not."""
    function = getattr(library, "GOMP_parallel", None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


def _file(address: int) -> str:
    """Return the name of the library file, without links, that contains an address."""
    symbol = _Symbol()
    known = ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(symbol))
    return Path(os.fsdecode(symbol.file)).resolve().name if known else ""
