"""Unpack saved tensors only once in a backward pass.

Hooks such as those of `torch.utils.checkpoint` and `save_on_cpu` take the tensors that a graph keeps, and return them
in the backward pass: computed again, once for each pass of the engine, or copied. Every vjp of an adjoint solve is a
separate pass, so a checkpoint around a layer would solve again for each vjp.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Hooks that delegate to the surrounding hooks, and keep their results until the surrounding pass has ended."""

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        super().__init__(self._pack, self._unpack)
        self._around = pack, unpack
        self._slots: list[weakref.ref[_Slot]] = []

    @classmethod
    def around(cls) -> Saved | None:
        """Return hooks for a graph that is recorded here, if other hooks surround it."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        return None if hooks is None else cls(*hooks)

    def fetch(self) -> None:
        """Unpack all tensors now, within the pass that runs here and for it."""
        slots = [slot for ref in self._slots if (slot := ref()) is not None]
        for slot in slots:
            slot.value = self._around[1](slot.packed)

        def forget() -> None:
            for slot in slots:
                slot.value = None

        Variable._execution_engine.queue_callback(forget)  # type: ignore[attr-defined]

    def _pack(self, tensor: Tensor) -> _Slot:
        slot = _Slot(self._around[0](tensor))
        self._slots.append(weakref.ref(slot))
        return slot

    def _unpack(self, slot: _Slot) -> Tensor:
        value: Tensor = self._around[1](slot.packed) if slot.value is None else slot.value
        return value


class _Slot:
    """One saved tensor: its form packed by the surrounding hooks, and the tensor while a pass needs it."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.value: Tensor | None = None
