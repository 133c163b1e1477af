"""The storage of a history: tensors `(slots, batch, n)`, and the products over them.

After k appends the storage holds k vectors, rounded up to a chunk, whatever `history_size` is. With the slot first a
vector is written in one piece, and after f has filled the caches products over `(256, 512)` take half the time that
they take with the batch first. They are written as row vector times matrix: on CPUs `bmm(v, Hᵀ)` moves several times
the bytes per second of `bmm(H, v)`. Dot products take the slots in units of fixed size, so that the bits of a sample
depend neither on the batch nor on the steps that its batch mates have taken.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

CHUNK = 4  # slots per chunk for large vectors, and slots per product: BLAS rounds a remainder in another way
ALIGNED = 16  # bytes: where the size of a row is not a multiple of it, MKL rounds a row by its address
NARROW = 256  # numbers per vector below which MKL rounds a combination by the number of slots in it
# Numbers per sample up to which products run over the whole memory: fewer operations, more bytes. Not numbers in all:
# a sample's bits must not depend on how many others there are.
TINY = 2**11
SMALL = 4096  # numbers per vector up to which one chunk holds the whole memory


def select_rows(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return rows of `new` where `mask` holds, of `old` elsewhere, on the host: copies of rows.

    `torch.where` with a broadcast mask takes 25 times as long there (256 × 512 float32: 520 µs against 20 µs).
    """
    rows = mask.numpy().nonzero()[0]
    count = len(rows)
    if count == mask.shape[0]:
        return new
    if count == 0:
        return old
    if 2 * count > mask.shape[0]:
        new, old, rows = old, new, (~mask.numpy()).nonzero()[0]
    chosen = torch.from_numpy(rows)
    return old.index_copy(0, chosen, new.index_select(0, chosen))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Keep the dtype of products inside the block: the user's autocast applies to f, not to coefficients."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def products(many: Tensor, part: Tensor) -> Tensor:
    """Return inner products `(batch, r, slots)` of `many` `(batch, r, n)` with `part` `(slots, batch, n)`."""
    if part.device.type != "cpu" or many.shape[2] * many.element_size() % ALIGNED == 0:
        return torch.bmm(many.contiguous(), part.permute(1, 2, 0))
    return (part[:, :, None] * many).sum(3).permute(1, 2, 0)


@cache
def one_hot_masks(history_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return the one-hot masks of all slots, shared and read-only."""
    return torch.eye(history_size, dtype=torch.bool, device=device).unbind(0)


@cache
def unwritten_masks(history_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return masks of the empty slots by the number of vectors written, shared and read-only."""
    slots = torch.arange(history_size, device=device)
    return (slots >= torch.arange(history_size + 1, device=device)[:, None]).unbind(0)


class Store:
    """The data that all versions of a history share; only `chunks`, which grows, and the plan change."""

    __slots__ = (
        "aligned",
        "batch",
        "chunk",
        "chunks",
        "compute",
        "dtype",
        "gaps",
        "history_size",
        "like",
        "narrow",
        "planned",
        "table",
        "whole",
        "wide",
        "width",
    )

    def __init__(
        self,
        chunks: list[Tensor],
        history_size: int,
        like: Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        wide: torch.dtype,
    ) -> None:
        self.chunks = chunks
        self.history_size = history_size
        self.like = like  # empty, with the device and dtype of the results of combine
        self.batch, self.width = shape
        self.chunk = history_size if self.width <= SMALL and history_size * self.width <= 16 * SMALL else CHUNK
        self.compute = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        self.aligned = like.device.type != "cpu" or self.width * self.compute.itemsize % ALIGNED == 0
        self.whole = self.chunk == history_size and history_size * self.width <= TINY and dtype is wide and self.aligned
        self.narrow = like.device.type == "cpu" and self.width < NARROW
        self.dtype = dtype
        self.wide = wide
        self.gaps = False  # whether slots were skipped: then all slots are allocated at once, with zeros
        self.planned: tuple[int, Tensor] | None = None  # see `TorchHistory.plan`
        self.table: Tensor | None = None  # see `TorchHistory.table`

    def with_chunks(self, chunks: list[Tensor], batch: int) -> Store:
        """Make a store with other chunks for vectors of the same kind."""
        store = Store(chunks, self.history_size, self.like, (batch, self.width), self.dtype, self.wide)
        store.gaps = self.gaps
        return store
