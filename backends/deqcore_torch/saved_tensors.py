"""Unpack saved tensors only once in a backward pass.

Hooks such as those of `torch.utils.checkpoint` and `save_on_cpu` take the tensors that a graph keeps, and return them
in the backward pass: computed again, once for each pass of the engine, or copied. Every vjp of an adjoint solve is a
separate pass, so a checkpoint around a layer would solve again for each vjp, and a checkpoint around its cell would
evaluate the cell again for each vjp.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import Tensor
from torch._C import _current_graph_task_id
from torch.autograd import Variable

from deqcore_torch import checkpoints

_collector: Final[ContextVar[Recording | None]] = ContextVar("_collector", default=None)


class Recording:
    """The hooks of one recorded evaluation. The graph keeps them alive, as they may refer to f and to its arguments."""

    def __init__(self) -> None:
        self._hooks: list[weakref.ref[Saved]] = []

    def add(self, saved: Saved) -> None:
        """Note hooks that are entered while the evaluation is recorded."""
        self._hooks.append(weakref.ref(saved))

    def fetch(self) -> None:
        """Let all hooks fetch their tensors, before vjps through the graph."""
        for hook in self._hooks:
            if (saved := hook()) is not None:
                saved.fetch()

    def release(self) -> None:
        """Let the next pass take each fetched tensor for the last time."""
        for hook in self._hooks:
            if (saved := hook()) is not None:
                saved.release()


@contextmanager
def recording() -> Iterator[Recording]:
    """Record an evaluation of f."""
    around, kept = Saved.around(), Recording()
    if around is not None:
        kept.add(around)
    token = _collector.set(kept)
    try:
        with around or nullcontext():
            yield kept
    finally:
        _collector.reset(token)


def checkpoint(f: Callable[..., Any], *args: Any) -> Any:
    """Return f(*args) under a checkpoint that an adjoint solve recomputes once, not for each of its vjps."""

    def held(*args: Any) -> Any:
        saved, recorded = Saved.around(), _collector.get()
        if recorded is not None and saved is not None:
            recorded.add(saved)
        with saved or nullcontext():
            return f(*args)

    return checkpoints.checkpoint(held, *args)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Hooks that delegate to the surrounding hooks, and keep their results until the surrounding pass needs them."""

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
        """Unpack all tensors now, within the pass that runs here: it takes each once, after the passes within it."""
        task, slots = _current_graph_task_id(), self._alive()
        for slot in slots:
            slot.value, slot.task = self._around[1](slot.packed), task

        def forget() -> None:
            for slot in slots:
                slot.value = None

        Variable._execution_engine.queue_callback(forget)  # type: ignore[attr-defined]

    def release(self) -> None:
        """Let the next pass take each tensor for the last time, whichever pass it is."""
        for slot in self._alive():
            slot.task = None

    def _alive(self) -> list[_Slot]:
        return [slot for ref in self._slots if (slot := ref()) is not None]

    def _pack(self, tensor: Tensor) -> _Slot:
        slot = _Slot(self._around[0](tensor))
        self._slots.append(weakref.ref(slot))
        return slot

    def _unpack(self, slot: _Slot) -> Tensor:
        value: Tensor = self._around[1](slot.packed) if slot.value is None else slot.value
        if slot.task in (None, _current_graph_task_id()):
            slot.value = None
        return value


class _Slot:
    """One saved tensor: its form packed by the surrounding hooks, and the tensor while the pass `task` needs it."""

    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.value: Tensor | None = None
        self.task: int | None = -1  # None: the next pass
