"""The dense cell with slow modes: the same equilibria, reached slowly."""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from deqcore.errors import ConfigError
from deqcore.study.models.base import Ops, Parameters, Shape
from deqcore.study.models.dense import Dense
from deqcore.types import Array

SMALLEST: Final = 4  # units that share a slow mode
FIRST, LAST = 0.1, 0.01  # what a step leaves of the way to the equilibrium, from the finest to the coarsest means


class Slow(Dense):
    """z ← t + S (z − t) with t = tanh(z W + x U + b): where `dense` jumps to t, this cell creeps along slow modes.

    S keeps the means over neighbouring units, over groups of 4, 8, … and all units, with eigenvalues from 0.9 to 0.99
    (the coarser the slower; a quarter of the width is slow) and nothing else. As 1 is not an eigenvalue of S, the
    equilibria, the loss and the exact gradients are those of `dense` with the same weights. What differs is the
    Jacobian, S + (I − S) W T, so that a comparison shows what slow modes alone do to a backward strategy.

    Source: a time constant for each unit is usual for continuous-time recurrent networks: Funahashi & Nakamura (1993),
    "Approximation of dynamical systems by continuous time recurrent neural networks"; here the modes have them.
    """

    def __init__(self, shape: Shape, width: int) -> None:
        if width < SMALLEST or width & (width - 1):
            raise ConfigError(f"The model 'slow': width must be a power of two, such as 32 (got {width}).")
        super().__init__(shape, width)
        self._groups = levels(width)

    def cell(self, ops: Ops, p: Parameters, z: Array, injected: Array) -> Array:
        """Return one step towards tanh(z W + injected)."""
        wanted = super().cell(ops, p, z, injected)
        left = z - wanted
        for size, rate in self._groups:
            wanted = wanted + rate * _means(ops, left, size)
        return wanted


def levels(width: int) -> list[tuple[int, float]]:
    """Return the sizes of the groups, and what each adds to the eigenvalues of the finer ones.

    Example:
        >>> [(size, round(rate, 3)) for size, rate in levels(16)]
        [(4, 0.9), (8, 0.068), (16, 0.022)]
    """
    count = width.bit_length() - SMALLEST.bit_length() + 1
    left = [FIRST * (LAST / FIRST) ** (level / max(1, count - 1)) for level in range(count)]
    rates = [1 - left[0], *(before - after for before, after in pairwise(left))]
    return [(SMALLEST << level, rate) for level, rate in enumerate(rates)]


def _means(ops: Ops, z: Array, size: int) -> Array:
    """Return means over groups of neighbours, each repeated for all of its group, `(b, width)`."""
    grouped = ops.xp.reshape(z, (z.shape[0], -1, size))
    mean = ops.xp.mean(grouped, axis=2, keepdims=True)
    return ops.xp.reshape(ops.xp.broadcast_to(mean, grouped.shape), z.shape)
