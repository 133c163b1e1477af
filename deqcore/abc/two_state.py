"""A fixed-point iteration of two states that can be run backwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from deqcore.abc.arrays import ArrayOps
from deqcore.errors import ConfigError
from deqcore.types import Array, Map

Pair = tuple[Array, Array]

MOST_LOSS: Final = 1e-6  # rounding, times what undoing every step adds to it, that a call accepts


@dataclass(frozen=True)
class TwoState:
    """y ← (1 − β) y + β f(z), then z ← (1 − β) z + β f(y), and its inverse.

    Each half step changes one state by a function of the other, so the same evaluation of f undoes it. Undoing it
    divides rounding by 1 − β. The states are carried in a wider dtype than f is evaluated in where this is needed.
    A step of two half steps can amplify by up to (1 − β)^−2, in the difference of the states, where f hardly contracts;
    early states, which are the least exact, then count the less the more f contracts.

    Attributes:
        be: the backend of the states.
        damping: β in (0, 1).
        dtype: the dtype of z0, in which f is evaluated.
        wide: whether the states are carried in the accumulation dtype.
        far: distance of the reconstructed start from z0, relative to the states, above which f was not the same.

    Source: McCallum, Arora & Foster (2025), "Reversible deep equilibrium models", arXiv:2509.12917.
    """

    be: ArrayOps
    damping: float
    dtype: str
    wide: bool
    far: float

    @classmethod
    def of(cls, be: ArrayOps, z0: Array, damping: float, steps: int) -> TwoState:
        """Choose the dtype that carries the states.

        Raises:
            ConfigError: no dtype of the backend carries them over so many steps with this damping.
        """
        growth = (1.0 - damping) ** -steps
        eps, least = be.eps(z0), min(be.eps(z0), be.eps(be.to_accum_dtype(z0)))
        if growth * least < MOST_LOSS:
            wide = growth * eps >= MOST_LOSS
            rounding = growth * growth * (least if wide else eps)
            return cls(be, damping, be.dtype_name(z0), wide, far=max(1e-4, 1e3 * rounding))
        most = 1.0 - (least / MOST_LOSS) ** (1.0 / steps)
        wider = " or a wider dtype (in JAX: jax_enable_x64)" if least > 1e-10 else ""
        raise ConfigError(
            f"reversible cannot undo {steps} steps with damping = {damping:g}: each step back multiplies rounding by "
            f"1/(1 − damping), {growth:.1e} in all, and only {MOST_LOSS / least:.1e} is safe in the widest dtype here. "
            f"Use damping below {most:.2g}, fewer steps{wider}, or the strategy 'unrolled' with checkpoint = true."
        )

    def start(self, z0: Array) -> Pair:
        """Return both states at the start."""
        z = self.up(z0)
        return z, z

    def up(self, x: Array) -> Array:
        """Cast to the dtype that carries the states."""
        return self.be.to_accum_dtype(x) if self.wide else x

    def down(self, x: Array) -> Array:
        """Cast to the dtype in which f is evaluated."""
        return self.be.astype(x, self.dtype) if self.wide else x

    def half(self, state: Array, value: Array) -> Array:
        """Return a state moved by f of the other one."""
        return (1.0 - self.damping) * state + self.damping * self.up(value)

    def half_back(self, state: Array, value: Array) -> Array:
        """Undo `half`."""
        return (state - self.damping * self.up(value)) / (1.0 - self.damping)

    def step(self, f: Map, pair: Pair, value: Array | None = None) -> Pair:
        """Take a step; two evaluations of f, or one if `value` is f of the second state."""
        y, z = pair
        y = self.half(y, f(self.down(z)) if value is None else value)
        return y, self.half(z, f(self.down(y)))
