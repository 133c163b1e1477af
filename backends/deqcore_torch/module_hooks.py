"""Keep the backward hooks of modules in f out of an adjoint solve.

A full backward hook of a module is a hook on a node of the graph that each evaluation records, so it would run in every
vector–Jacobian product of the adjoint solve. Users count, log or clip gradients in such hooks, and expect one backward
pass of the cell: the one that carries u to the parameters. `Mute` skips the hooks in all other passes.

Hooks that f sets on tensors (`Tensor.register_hook`) run in every product, because PyTorch gives no access to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch._C import _current_graph_task_id
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from deqcore_torch.graph import leaf_of


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
    for node in _nodes(y, start):
        for number, hook in (hooks := _hooks(node)).items():
            if number >= before:
                hooks[number] = mute.gate(hook)
    return mute


@contextmanager
def unhooked(outputs: Sequence[Tensor], ends: Sequence[Tensor]) -> Iterator[None]:
    """Skip hooks of the tensors at the ends of passes that begin at `outputs` in this context.

    These passes form parts of a gradient, which hooks and `retain_grad` get as a whole. Other threads' passes run them.
    """
    retained = [(tensor, tensor.grad) for tensor in ends if tensor.retains_grad]
    hooked = [hooks for tensor in ends if (hooks := tensor._backward_hooks)]
    passes: set[int] = set()

    def gate(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda gradient: None if _current_graph_task_id() in passes else hook(gradient)

    nodes = [output.grad_fn for output in outputs if output.grad_fn is not None] if hooked else []
    begun = [node.register_prehook(lambda _: passes.add(_current_graph_task_id())) for node in nodes]
    before = [dict(hooks) for hooks in hooked]
    for hooks in hooked:
        hooks.update({number: gate(hook) for number, hook in hooks.items()})
    try:
        yield
    finally:
        for handle in begun:
            handle.remove()
        for hooks, own in zip(hooked, before, strict=True):
            hooks.update({number: hook for number, hook in own.items() if number in hooks})
        for tensor, grad in retained:
            tensor.grad = grad


def _nodes(y: Tensor, start: int) -> Iterator[Any]:
    """Yield the nodes behind y that were made since `start`, without those of leaves."""
    seen: set[Any] = set()
    stack: list[Any] = [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen or leaf_of(node) is not None or node._sequence_nr() < start:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def _hooks(node: Any) -> dict[int, Callable[..., Any]]:
    """Return the hooks of a node by their numbers: the dict that the engine reads."""
    handle = node.register_hook(lambda *_: None)
    hooks: dict[int, Callable[..., Any]] = handle.hooks_dict_ref()
    handle.remove()
    return hooks
