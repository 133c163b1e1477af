"""What the native steps for the host read: tensors as NumPy arrays of the same memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from deqcore_torch.history import TorchHistory

VECTORS: Final = (torch.float32, torch.float64)


def plain(z: Tensor) -> bool:
    """Return whether kernels can read this: some rows of float32 or float64, on the host, in one piece."""
    return type(z) is Tensor and z.is_cpu and z.dtype in VECTORS and z.is_contiguous() and z.numel() > 0


def holds(history: Any, like: Tensor) -> bool:
    """Return whether the history stores vectors unchanged."""
    return type(history) is TorchHistory and history.store.dtype is like.dtype


def room(like: Tensor) -> Tensor:
    """Allocate contiguous memory for a result, for any strides of `like`."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def view(x: Tensor) -> Any:
    """Return the same memory as a NumPy array; a copy, for reading only, if it is not contiguous."""
    x = x.detach() if x.requires_grad else x
    return x.numpy() if x.is_contiguous() else x.contiguous().numpy()


@lru_cache(64)
def everywhere(*shape: int) -> Any:
    """Return an array of True, shared and only read."""
    return np.ones(shape, np.bool_)


@lru_cache(64)
def ones(batch: int) -> Any:
    """Return an array of 1, shared and only read."""
    return np.ones(batch)


def chosen(rows: Tensor | None, batch: int) -> Any:
    """Return a mask of rows `(batch,)`; None means all of them."""
    return everywhere(batch) if rows is None else view(rows)


def masks(before: TorchHistory, after: TorchHistory) -> tuple[Any, Any]:
    """Return which rows are active, and which slots each has seen once the new one is written."""
    batch = after.store.batch
    seen = everywhere(batch, after.history_size) if after.seen is None else view(after.seen)
    return chosen(before.active, batch), seen
