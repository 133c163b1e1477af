"""Passive records that the parts of a solve exchange. This package imports nothing from above.

Arrays are those of the backend's framework. `(batch,)` and `(batch, n)` are shapes; a record that is a NamedTuple may
stand inside compiled, traced code. Names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deqcore.lazy import lazy_names

if TYPE_CHECKING:
    from deqcore.types.arrays import Array, LoopVars, Map, ParameterVjp, Tree
    from deqcore.types.backend import Capabilities, Figures
    from deqcore.types.backward import AdjointReport, BackwardRecord, PassInputs
    from deqcore.types.bound_map import BoundMap
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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "deqcore.types.arrays": ["Array", "LoopVars", "Map", "ParameterVjp", "Tree"],
        "deqcore.types.backend": ["Capabilities", "Figures"],
        "deqcore.types.backward": ["AdjointReport", "BackwardRecord", "PassInputs"],
        "deqcore.types.bound_map": ["BoundMap"],
        "deqcore.types.forward": [
            "FINE",
            "Limits",
            "LoopState",
            "Path",
            "Reached",
            "SolveResult",
            "StepResult",
            "StoppingCriteria",
        ],
        "deqcore.types.status": ["SEARCHING", "Status"],
    },
)
