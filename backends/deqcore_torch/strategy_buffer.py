"""The state of a strategy, kept in a buffer of its layer."""

from __future__ import annotations

import weakref
from typing import Protocol

import torch
from torch import Tensor

from deqcore.abc.strategy_state import StrategyState


class HasState(Protocol):
    """A layer with a buffer for the state of its strategy."""

    strategy_state: Tensor | None


class BufferState(StrategyState):
    """The state in the buffer of a layer, written in place: others, such as DDP, hold the same tensor.

    The graph refers to it, so it does not keep the layer alive. Without its layer a pass is the first.
    """

    def __init__(self, layer: HasState) -> None:
        self._layer = weakref.ref(layer)

    @property
    def values(self) -> Tensor | None:
        """The buffer."""
        layer = self._layer()
        return None if layer is None else layer.strategy_state

    @values.setter
    def values(self, new: Tensor | None) -> None:
        layer = self._layer()
        if layer is None:
            return
        own = layer.strategy_state
        with torch.no_grad():
            if new is None:
                layer.strategy_state = None
            elif own is None or own.shape != new.shape:
                layer.strategy_state = new.detach().clone()
            else:
                own.copy_(new)
