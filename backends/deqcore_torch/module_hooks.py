"""Keep the backward hooks of modules in f out of an adjoint solve.

A full backward hook of a module is a hook on a node of the graph that each evaluation records, so it would run in every
vector–Jacobian product of the adjoint solve. Users count, log or clip gradients in such hooks, and expect one backward
pass of the cell: the one that carries u to the parameters. `Mute` skips the hooks in all other passes.

Hooks that f sets on tensors (`Tensor.register_hook`) run in every product, because PyTorch gives no access to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, Final

from torch import Tensor
from torch._C import _current_graph_task_id
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from deqcore_torch.graph import nodes_since

_partial: Final[set[int]] = set()  # numbers of the passes that run for parts of gradients


class Mute:
    """A context in which hooks on the nodes of one recorded evaluation do nothing."""

    def __init__(self) -> None:
        self.hooks = 0
        self._depth = 0  # the engine may run a pass of the context in another thread

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1

    def gate(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return `hook` as a hook that does nothing in this context."""
        self.hooks += 1
        return lambda *gradients: None if self._depth else hook(*gradients)

    def finish_pass(self) -> None:
        """Mute the hooks for the rest of the pass that runs here: it visits the nodes without gradients."""
        if self.hooks:
            self.__enter__()
            Variable._execution_engine.queue_callback(self.__exit__)  # type: ignore[attr-defined]


def hooks_made() -> int:
    """Return the number of the next hook of PyTorch: it shows whether an evaluation has set hooks."""
    return RemovableHandle.next_id


def muted(y: Tensor, before: int, start: int = 0) -> Mute:
    """Return a context for passes through the graph of y that must not run the hooks which f set on its nodes.

    Args:
        y: the value of f.
        before: `hooks_made()` before f ran.
        start: sequence number below those of the nodes that f made, so that the walk ends there.
    """
    mute = Mute()
    if hooks_made() == before:
        return mute
    for node in nodes_since([y], start):
        for number, hook in (hooks := _hooks(node)).items():
            if number >= before:
                hooks[number] = mute.gate(hook)
    return mute


class _OfWhole:
    """A hook of a tensor that passes for a part of its gradient skip."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        update_wrapper(self, hook)

    def __call__(self, gradient: Tensor) -> Any:
        return None if _current_graph_task_id() in _partial else self.__wrapped__(gradient)  # type: ignore[attr-defined]


@contextmanager
def unhooked(outputs: Sequence[Tensor], ends: Sequence[Tensor]) -> Iterator[None]:
    """Skip hooks of the tensors at the ends of passes that begin at `outputs` in this context.

    These passes form parts of a gradient, which hooks and `retain_grad` get as a whole. Other threads' passes run them.
    The hooks stay wrapped: a thread that restored them would restore them for the passes of other threads, too.
    """
    retained = [(tensor, tensor.grad) for tensor in ends if tensor.retains_grad]
    hooked = [hooks for tensor in ends if (hooks := tensor._backward_hooks)]
    for hooks in hooked:
        hooks.update({i: _OfWhole(hook) for i, hook in list(hooks.items()) if type(hook) is not _OfWhole})
    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None] if hooked else []
    begun: set[int] = set()

    def begin(_: Any) -> None:
        begun.add(_current_graph_task_id())
        _partial.update(begun)

    handles = [node.register_prehook(begin) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _partial.difference_update(begun)
        for tensor, grad in retained:
            tensor.grad = grad


def _hooks(node: Any) -> dict[int, Callable[..., Any]]:
    """Return the hooks of a node by their numbers: the dict that the engine reads."""
    handle = node.register_hook(lambda *_: None)
    hooks: dict[int, Callable[..., Any]] = handle.hooks_dict_ref()
    handle.remove()
    return hooks
