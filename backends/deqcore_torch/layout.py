"""Trees of plain containers as a text and a list of tensors, the two things that an operator takes.

`torch.compile` traces `describe`, so it uses only what that can trace, and the text is a constant of the graph.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from deqcore import config as settings
from deqcore.types import Tree

P = ParamSpec("P")
R = TypeVar("R")


def describe(tree: Tree, tensors: list[Tensor], *, named: bool = False) -> str | None:
    """Return the text of a tree, with `...` for each tensor, and append the tensors; None if it holds other objects.

    Args:
        tree: tuples, lists, dicts with keys of type str or int, numbers, strings and None.
        tensors: receives the tensors in order.
        named: named tuples are trees, too, as plain tuples in the text: for a caller that has the tree itself.
    """
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return "..."
    if tree is None or isinstance(tree, bool | int | str):
        return repr(tree)
    if isinstance(tree, float):
        return repr(tree) if tree - tree == 0.0 else None
    if type(tree) is dict:
        parts = [
            (repr(key), describe(value, tensors, named=named))
            for key, value in tree.items()
            if isinstance(key, str | int)
        ]
        if len(parts) < len(tree):
            return None
        texts = [None if text is None else f"{key}: {text}" for key, text in parts]
        return _joined("{", texts, "}")
    if type(tree) is list:
        return _joined("[", [describe(value, tensors, named=named) for value in tree], "]")
    if type(tree) is tuple or (named and is_named(tree)):
        return _joined("(", [describe(value, tensors, named=named) for value in tree], ",)" if tree else ")")
    return None


def is_named(tree: Tree) -> bool:
    """Return whether this is a named tuple."""
    return isinstance(tree, tuple) and hasattr(tree, "_fields")


def _joined(start: str, texts: list[str | None], end: str) -> str | None:
    parts = [text for text in texts if text is not None]
    return start + ", ".join(parts) + end if len(parts) == len(texts) else None


def arrange(text: str, tensors: Iterator[Tensor]) -> Any:
    """Return the tree that `describe` gave this text for, with the next of `tensors` in each place."""
    return _filled(_parsed(text), tensors)


_parsed = lru_cache(maxsize=256)(ast.literal_eval)


def _filled(tree: Tree, tensors: Iterator[Tensor]) -> Any:
    if tree is ...:
        return next(tensors)
    if isinstance(tree, dict):
        return {key: _filled(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_filled(value, tensors) for value in tree])
    return tree


def rebuilt(tree: Tree, values: list[Tensor]) -> Any:
    """Return a tree like `tree` with the next of `values` for each tensor, which it removes from the list."""
    return mapped(lambda _: values.pop(0), tree)


def mapped(fn: Callable[[Tensor], Any], tree: Tree) -> Any:
    """Return a tree like `tree` with `fn` of each tensor; a compiler can trace it."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, dict):
        return {key: mapped(fn, value) for key, value in tree.items()}
    if is_named(tree):
        return type(tree)(*[mapped(fn, value) for value in tree])
    if isinstance(tree, list | tuple):
        return type(tree)([mapped(fn, value) for value in tree])
    return tree


def at_trace_time(fn: Callable[P, R]) -> Callable[P, R]:
    """Return `fn` marked to be run while a compiler traces its caller; its result is a constant of the graph."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined] # what torch.compiler.assume_constant_result sets
    return fn


def wanted(tensors: list[Tensor]) -> list[int]:
    """Return the positions of the tensors that need gradients."""
    if not torch.is_grad_enabled():
        return []
    return [i for i, tensor in enumerate(tensors) if tensor.requires_grad]


@at_trace_time
def batch_axes(chosen: bool | int | None) -> int:
    """Return the leading axes that number the rows, for a call that gives `forward.batch` itself or does not."""
    resolved, _ = settings.resolve(None, {} if chosen is None else {"forward__batch": chosen})
    return int(resolved.forward.batch)


def rows_shape(like: Tensor, axes: int) -> tuple[Any, ...]:
    """Return the shape of a report about a state with a leaf `like`; `(1,)` if the whole state is one system."""
    return tuple(like.shape[:axes]) or (1,)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of residuals for a state of this dtype."""
    if dtype.is_complex:
        return torch.float32 if dtype is torch.complex64 else torch.float64
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def autocast_dtype(like: Tensor) -> torch.dtype | None:
    """Return the dtype of automatic mixed precision on the device of `like`, or None where it is off."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def placeholders(like: Tensor, rows: tuple[Any, ...]) -> list[Tensor]:
    """Return tensors like what a solve returns before its value: the token, then residual, status, steps, evaluations.

    Args:
        like: a leaf of the state.
        rows: the shape of the report.
    """
    token = torch.empty((1,), dtype=torch.int64, device="cpu")
    counts = [like.new_empty(rows, dtype=torch.int32) for _ in range(3)]
    return [token, like.new_empty(rows, dtype=wide(like.dtype)), *counts]
