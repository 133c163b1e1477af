"""Small problems as source text: a report shows exactly the code that was run.

`f` is an expression in `z`, `b` and the array namespace `xp`, which acts on each row alone. Rows are samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from deqcore.testing.suite.fixtures import Kit
from deqcore.types import Array

Rows = list[list[float]]
REPEATS: Final = 20_000
SIZES: Final = (256, 512)
"""Numbers in a state where memory is measured: the difference leaves out what does not grow with it."""
MEMORY: Final = "peak memory in states"


@dataclass(frozen=True)
class Case:
    """A fixed-point problem z = f(z, b) with z0 and b `(batch, n)`.

    Attributes:
        f: an expression.
        z0: the start.
        b: the argument for which gradients are asked.
        rtol: the tolerance on ‖f(z) − z‖ / ‖f(z)‖.
        max_steps: the budget of the solver's own steps.
        dtype: of all arrays.

    Example:
        >>> Case("0.5 * z + b", [[0.0]], [[1.0]]).truth.round(6).tolist()
        [[2.0]]
    """

    f: str
    z0: Rows
    b: Rows
    rtol: float = 1e-6
    max_steps: int = 300
    dtype: str = "float64"

    def function(self, xp: Any) -> Callable[[Any, Any], Any]:
        """Return f for arrays of the namespace."""
        compiled: Callable[[Any, Any], Any] = eval(f"lambda z, b: {self.f}", {"xp": xp})  # text of this package
        return compiled

    @property
    def truth(self) -> Any:
        """z* `(batch, n)` by plain iteration in NumPy and float64, for a contracting f."""
        f, z, b = self.function(np), np.array(self.z0, float), np.array(self.b, float)
        with np.errstate(all="ignore"):
            for _ in range(REPEATS):
                after = f(z, b)
                if np.array_equal(after, z, equal_nan=True):
                    break
                z = after
        return z

    def alone(self, row: int) -> Case:
        """Return the case with one of its samples only."""
        return replace(self, z0=[self.z0[row]], b=[self.b[row]])

    def arrays(self, kit: Kit) -> tuple[Callable[..., Array], Array, Array]:
        """Return f, z0 and b of the backend."""
        xp: Any = np if kit.backend.name == "numpy" else kit.backend.xp
        return self.function(xp), kit.array(self.z0, self.dtype), kit.array(self.b, self.dtype)

    def residual(self, z: Any) -> Any:
        """‖f(z) − z‖ / ‖f(z)‖ `(batch,)` in NumPy and float64."""
        z = np.asarray(z, float)
        with np.errstate(all="ignore"):
            fz = self.function(np)(z, np.array(self.b, float))
            return np.linalg.norm(fz - z, axis=1) / np.maximum(np.linalg.norm(fz, axis=1), 1e-300)

    def text(self, solver: str, *, after: str = "") -> str:
        """Return the case as a few lines of code."""
        z0, b = (str(rows).replace("nan", "float('nan')") for rows in (self.z0, self.b))
        kind = "" if self.dtype == "float64" else f"  # {self.dtype}"
        call = f"result = solve({solver!r}, f, z0, b, rtol={self.rtol:g}, max_steps={self.max_steps})"
        return "\n".join(
            [f"f = lambda z, b: {self.f}", f"z0 = {z0}{kind}", f"b = {b}", call, *([after] if after else [])]
        )


LINEAR: Final = Case("0.5 * z + b", [[0.0, 0.0]], [[1.0, 2.0]])
CURVED: Final = Case("0.5 * xp.tanh(z) + b", [[0.0, 0.0]], [[0.5, -0.25]])
ALTERNATING: Final = Case("-0.9 * z + b", [[0.0, 0.0]], [[1.0, -2.0]])
TURNING: Final = Case(
    "xp.stack([0.5 * z[:, 0] - 0.6 * z[:, 1], 0.6 * z[:, 0] + 0.5 * z[:, 1]], 1) + b", [[0.0, 0.0]], [[1.0, 0.0]]
)
SLOW: Final = Case("xp.stack([0.99 * z[:, 0], -0.5 * z[:, 1]], 1) + b", [[0.0, 0.0]], [[1.0, 1.0]], max_steps=3000)
EASY: Final = {"linear": LINEAR, "curved": CURVED, "alternating": ALTERNATING, "turning": TURNING}

MATES: Final = Case("b[:, :1] * z + 1.0 * b[:, 1:]", [[0.0], [0.0]], [[0.2, 1.0], [0.95, 1.0]], rtol=1e-3)
SPOILED: Final = Case("0.5 * xp.tanh(z) + b", [[0.0, 0.0], [0.0, 0.0]], [[0.5, -0.25], [float("nan"), 1.0]])

HOPELESS: Final = {
    "translation": Case("z + b", [[0.0, 0.0]], [[1.0, 1.0]]),
    "parabola": Case("z + z * z + b", [[0.5, 0.5]], [[1.0, 1.0]]),
    "expansion without a root": Case("2.0 * z + xp.abs(z) + b", [[1.0, 1.0]], [[1.0, 1.0]]),
    "nan": Case("0.5 * z + b", [[0.0, 0.0]], [[float("nan"), 1.0]]),
}
"""Problems without a solution."""
BUDGET: Final = Case("0.999 * z + xp.sin(0.0 * z) + b", [[0.0, 0.0]], [[1.0, -1.0]], rtol=1e-9, max_steps=5)
"""Five plain steps from 0 leave a relative residual of 0.17."""
