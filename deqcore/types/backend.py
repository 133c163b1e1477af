"""What a backend can do, and figures that leave its traced code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do. Tests and the core ask for capabilities, never for a backend's name.

    Attributes:
        autodiff: it differentiates f itself (otherwise by a dense Jacobian of finite differences).
        jvp: it has forward-mode products J v.
        jit: fixed_point works inside compiled, traced code.
        vmap: fixed_point can be vectorised over a further axis.
        float64: double-precision states are exact without a global switch.
        bfloat16: a state or a history can be bfloat16.
        complex: a state can be complex.
        accelerator: arrays can live on another device than the host.
        second_derivatives: gradients of gradients of exact-ift are right.
        compaction: a solve may continue with fewer rows than it began with (shapes are known step by step).
        eager: every call of fixed_point runs its Python code, never code compiled in an earlier call.
        nested_loops: loops inside loops and budgets that are arrays are worth while now, as in traced code.

    Example:
        >>> import deqcore
        >>> deqcore.get_backend(backend="numpy").capabilities.compaction
        True
    """

    autodiff: bool = True
    jvp: bool = False
    jit: bool = False
    vmap: bool = False
    float64: bool = True
    bfloat16: bool = False
    complex: bool = False
    accelerator: bool = False
    second_derivatives: bool = False
    compaction: bool = False
    eager: bool = True
    nested_loops: bool = False


class Figures(Protocol):
    """A few numbers about a batch, a NamedTuple of arrays, that may leave traced code. See `CallGuards.watch`.

    Example:
        >>> import numpy as np
        >>> from deqcore.solution import Tally
        >>> found: Figures = Tally.of(np, np.array([1, 2]), np.array([3, 9]), np.array([1e-6, 0.5]))
        >>> bool(found.notable())
        True
    """

    def notable(self) -> Any:
        """Return whether the host must see them: one bool."""

    def merged(self, xp: Any) -> Any:
        """Return one record of the same kind from a stack of them along the first axis of each array."""
