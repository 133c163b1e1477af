"""Solver steps compiled by Numba, where it is installed: ``pip install "deqcore[native]"``.

``DEQCORE_NATIVE=0`` in the environment turns them off.
"""

from __future__ import annotations

import importlib
import os
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@cache
def loaded() -> ModuleType | Any | None:
    """The module of native steps; None where Numba is not installed or turned off."""
    if os.environ.get("DEQCORE_NATIVE", "1") == "0" or find_spec("numba") is None:
        return None
    try:
        return importlib.import_module("deqcore_torch.native.steps")
    except (ImportError, RuntimeError) as error:  # RuntimeError: no folder that Numba may keep its cache in
        warnings.warn(f"Solver steps run without compiled code, as Numba does not work here: {error}", stacklevel=2)
        return None
