"""Passive records that the parts of a solve exchange. This package imports nothing from above.

Arrays are those of the backend's framework. `(batch,)` and `(batch, n)` are shapes; a record that is a NamedTuple may
stand inside compiled, traced code.
"""

from __future__ import annotations

from deqcore.types.arrays import Array, BoundMap, LoopVars, Map, ParameterVjp, Tree
from deqcore.types.backend import Capabilities, Figures
from deqcore.types.backward import AdjointReport, BackwardRecord, PassInputs
from deqcore.types.forward import (
    FINE,
    Limits,
    LoopState,
    Path,
    Reached,
    SolveResult,
    StepResult,
    StoppingCriteria,
)
from deqcore.types.status import SEARCHING, Status

__all__ = [
    "FINE",
    "SEARCHING",
    "AdjointReport",
    "Array",
    "BackwardRecord",
    "BoundMap",
    "Capabilities",
    "Figures",
    "Limits",
    "LoopState",
    "LoopVars",
    "Map",
    "ParameterVjp",
    "PassInputs",
    "Path",
    "Reached",
    "SolveResult",
    "Status",
    "StepResult",
    "StoppingCriteria",
    "Tree",
]
