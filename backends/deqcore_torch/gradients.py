"""The value of one tensor with the derivative of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(value: Tensor, carrier: Tensor) -> Tensor:
    """Return `value` with the derivative of `carrier`, of any order and in both modes; no NaN of `carrier` enters it.

    Source: Bengio, Léonard & Courville (2013), "Estimating or propagating gradients through stochastic neurons".
    """
    attached: Tensor = _StraightThrough.apply(value, carrier)
    return attached


class _StraightThrough(torch.autograd.Function):
    """A function of `value` and `carrier` whose derivative is the identity on the second."""

    @staticmethod
    def forward(value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()  # later code may write in place, but not into the solve's state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None, cotangents[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[1].clone()  # a new tensor, as the output is
