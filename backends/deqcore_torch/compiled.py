"""Which native steps there are for a tensor; `DEQCORE_NATIVE=0` in the environment turns them off.

The modules of `deqcore_torch.native` know histories and need a compiler, so they are loaded by name when they are first
used. Histories and the backend ask here, and import none of them.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Final

from torch import Tensor

from deqcore.solve.user_line import warn
from deqcore_torch import functorch

COMPILERS: Final = {"cpu": ("numba", "steps"), "cuda": ("triton", "device")}
"""The compiler of each type of device, and the module of its native steps."""


def reading(x: Tensor) -> ModuleType | Any | None:
    """Return the native steps, if they can read x and neither autograd nor a transformation tracks it."""
    if functorch.is_tracked(x):
        return None
    steps = loaded("cpu" if x.is_cpu else x.device.type)
    return None if steps is None or not steps.plain(x) else steps


def products(x: Tensor) -> bool:
    """Return whether this device has native products with histories. On CPUs torch's own are as fast."""
    steps = loaded(x.device.type)
    return steps is not None and hasattr(steps, "dots")


@cache
def loaded(kind: str) -> ModuleType | Any | None:
    """Return the module of native steps for this kind of device; None without its compiler, or if they are off."""
    compiler, module = COMPILERS.get(kind, (None, None))
    if compiler is None or os.environ.get("DEQCORE_NATIVE", "1") == "0" or find_spec(compiler) is None:
        return None
    try:
        steps = importlib.import_module(f"deqcore_torch.native.{module}")
        steps.probe()
    except Exception as error:  # no folder for Numba's cache, no C compiler for Triton, an unsupported GPU, …
        name, reason = compiler.capitalize(), str(error).rstrip(".")
        warn(
            f"Solver steps run without compiled code, because {name} does not work here: {reason}. "
            "Set DEQCORE_NATIVE=0 to silence this warning.",
            UserWarning,
        )
        return None
    return steps
