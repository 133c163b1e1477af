"""A history that grows in place, chunk by chunk.

Storage is a list of tensors `(slots, batch, n)`: after k appends it holds k vectors, rounded up to a chunk, whatever
`history_size` is. With the slot first a vector is written in one piece, and after f has filled the caches products
over `(256, 512)` take half the time that they take with the batch first. They are written as row vector times matrix:
on CPUs `bmm(v, Hᵀ)` moves several times the bytes per second of `bmm(H, v)`. Dot products take the slots in units of
fixed size, so that the bits of a sample depend neither on the batch nor on the steps that its batch mates have taken.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqcore.abc.history import History
from deqcore_torch import compiled

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
def _units(history_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return the one-hot masks of all slots, shared and read-only."""
    return torch.eye(history_size, dtype=torch.bool, device=device).unbind(0)


@cache
def _unwritten(history_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return masks of the empty slots by the number of vectors written, shared and read-only."""
    slots = torch.arange(history_size, device=device)
    return (slots >= torch.arange(history_size + 1, device=device)[:, None]).unbind(0)


class _Store:
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

    def with_chunks(self, chunks: list[Tensor], batch: int) -> _Store:
        """Make a store with other chunks for vectors of the same kind."""
        store = _Store(chunks, self.history_size, self.like, (batch, self.width), self.dtype, self.wide)
        store.gaps = self.gaps
        return store


class TorchHistory(History):
    """A ring of vectors in chunks; see `deqcore.abc.history.History`.

    While every sample has seen every vector (no restart, no frozen row yet) `seen` is None and no mask is applied. The
    host counts appends: if it knows since which append the active samples hold every vector, and none before, it knows
    without reading the device when they are full.
    """

    __slots__ = ("active", "history_size", "seen", "since", "store", "written")

    def __init__(
        self, store: _Store, seen: Tensor | None, written: int, active: Tensor | None, since: int | None = None
    ) -> None:
        self.store = store
        self.history_size = store.history_size
        self.seen = seen  # (batch, memory) of bool
        self.written = written
        self.active = active
        self.since = since  # the active samples see all appends from this one on; None: not known on the host

    @classmethod
    def empty(cls, like: Tensor, history_size: int, dtype: torch.dtype, wide: torch.dtype) -> TorchHistory:
        """Make an empty history for vectors like `like` `(batch, n)`."""
        return cls(_Store([], history_size, like[:0], tuple(like.shape), dtype, wide), None, 0, None, 0)

    def _with(self, seen: Tensor | None, written: int, active: Tensor | None, since: int | None) -> TorchHistory:
        return TorchHistory(self.store, seen, written, active, since)

    def used(self) -> int:
        """Return how many slots have been written."""
        return min(self.written, self.history_size)

    def _mask(self) -> Tensor:
        if self.seen is not None:
            return self.seen
        mask = torch.zeros(self.store.batch, self.history_size, dtype=torch.bool, device=self.store.like.device)
        mask[:, : self.used()] = True
        return mask

    def append(self, v: Tensor) -> TorchHistory:
        self._copy(v, self._place(v))
        return self.appended()

    def append_difference(self, a: Tensor, b: Tensor) -> TorchHistory:
        target = self._place(a)
        if self.active is None and a.dtype is self.store.dtype:
            torch.sub(a, b, out=target)
        else:
            self._copy(a - b, target)
        return self.appended()

    def appended(self, seen: Tensor | None = None) -> TorchHistory:
        """Return this history with the next slot written; `seen` is that of a history in step with it."""
        if seen is None and (self.active is not None or self.seen is not None):
            slot = self.written % self.history_size
            seen = self._mask().clone() if self.seen is not None else self._mask()
            seen[:, slot] = True if self.active is None else seen[:, slot] | self.active
        return self._with(seen, self.written + 1, self.active, self.since)

    def reserve(self, like: Tensor) -> int:
        """Allocate storage for the next vector and return its slot."""
        self._place(like)
        return self.written % self.history_size

    def reserved(self, like: Tensor, *, zeroed: bool = True) -> Tensor:
        """Allocate storage for the next vector and return it, `(batch, n)`.

        Without `zeroed` slots that are not written hold anything: for a history that is only read as `vectors`.
        """
        return self._place(like, zeroed)

    def addresses(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the memory addresses of the chunks."""
        return np.array([chunk.data_ptr() for chunk in self.store.chunks], np.int64)

    def table(self) -> Tensor:
        """Return the addresses as a tensor on the device, without waiting for it."""
        store = self.store
        if store.table is None or store.table.shape[0] != len(store.chunks):
            host = torch.from_numpy(self.addresses())
            pinned = host.pin_memory() if store.like.is_cuda else host
            store.table = pinned.to(store.like.device, non_blocking=True)
        return store.table

    def plan(self, following: Tensor) -> None:
        """Remember the iterate of the next step, computed while the vectors were in the cache."""
        self.store.planned = self.written, following

    def take_planned(self) -> Tensor | None:
        """Return the iterate planned after the latest append, once."""
        planned, self.store.planned = self.store.planned, None
        return planned[1] if planned is not None and planned[0] == self.written else None

    def _copy(self, v: Tensor, target: Tensor) -> None:
        if self.active is None:
            target.copy_(v)
            return
        if self.written < self.history_size:
            target.zero_()  # this slot is new, and rows that are not active must not hold uninitialised memory
        if v.device.type == "cpu":
            rows = torch.from_numpy(self.active.numpy().nonzero()[0])
            target.index_copy_(0, rows, v.index_select(0, rows).to(self.store.dtype))
        else:
            target.copy_(torch.where(self.active[:, None], v.to(self.store.dtype), target))

    def _place(self, v: Tensor, zeroed: bool = True) -> Tensor:
        chunk, row = divmod(self.written % self.history_size, self.store.chunk)
        last = (self.history_size - 1) // self.store.chunk if self.store.gaps else chunk
        while len(self.store.chunks) <= last:
            slots = min(self.store.chunk, self.history_size - self.store.chunk * len(self.store.chunks))
            filled = self.store.whole or self.store.narrow or self.store.gaps
            make = v.new_zeros if zeroed and filled else v.new_empty
            self.store.chunks.append(make((slots, *v.shape), dtype=self.store.dtype))
        return self.store.chunks[chunk][row]

    def _filled(self) -> list[Tensor]:
        """Return the chunks in use, cut to the slots written.

        Slot by slot where large vectors must be widened first, and in units where BLAS rounds more by the address.
        """
        left, parts = self.used(), []
        whole = self.store.dtype is self.store.compute or self.store.chunk > CHUNK
        for chunk in self.store.chunks:
            if left <= 0:
                break
            part = chunk if left >= chunk.shape[0] else chunk[:left]
            parts += [part] if whole and self.store.aligned else list(part.split(CHUNK if whole else 1))
            left -= chunk.shape[0]
        return parts

    def _whole_units(self) -> list[Tensor]:
        """Return the chunks in use, in units whose numbers of slots depend on their place alone."""
        used, units = self.used(), []
        size = 1 if self.store.dtype is not self.store.compute and self.store.chunk == CHUNK else CHUNK
        for i, chunk in enumerate(self.store.chunks):
            left = used - i * self.store.chunk
            units += [chunk[start : start + size] for start in range(0, min(left, chunk.shape[0]), size)]
        return units

    def _hidden(self) -> Tensor | None:
        """Return a mask of the slots without a vector, per sample or for all; None if every slot has one."""
        if self.seen is not None:
            return ~self.seen
        return (
            None
            if self.written >= self.history_size
            else _unwritten(self.history_size, self.store.like.device)[self.written]
        )

    def dot(self, v: Tensor) -> Tensor:
        with full_precision(v.device):
            return self._dot(v)

    def _dot(self, v: Tensor) -> Tensor:
        if self.store.whole and self.store.chunks and v.dtype is self.store.wide and v.dim() == 2:
            result = products(v[:, None], self.store.chunks[0])[:, 0]
            hidden = self._hidden()
            return result if hidden is None else result.masked_fill_(hidden, 0.0)
        if self.store.chunks and v.dim() == 2 and compiled.products(v) and (kernels := compiled.reading(v)) is not None:
            fused: Tensor = kernels.dots(self, v)
            return fused
        return self._dot_by_units(v)

    def _dot_by_units(self, v: Tensor) -> Tensor:
        """`dot` by products with a fixed number of slots each, which may include slots that are not written yet."""
        many = v if v.dim() == 3 else v[:, None]
        compute = self.store.compute
        if many.dtype is not compute:
            many = many.to(compute)
        result = many.new_zeros((self.store.batch, many.shape[1], self.history_size), dtype=self.store.wide)
        start = 0
        for part in self._whole_units():
            end = start + part.shape[0]
            result[:, :, start:end] = products(many, part.to(compute))
            start = end
        hidden = self._hidden()
        if hidden is not None:
            result = result.masked_fill_(hidden if hidden.dim() == 1 else hidden[:, None], 0.0)
        return result if v.dim() == 3 else result[:, 0]

    def combine(self, coefficients: Tensor) -> Tensor:
        combination = self._fused(coefficients, None)
        return self._sum(coefficients, None) if combination is None else combination

    def _fused(self, coefficients: Tensor, base: Tensor | None) -> Tensor | None:
        """Return the combination by one kernel, or None if this device or dtype has none."""
        if not self.store.chunks or not compiled.products(coefficients):
            return None
        coefficients, base = coefficients.contiguous(), None if base is None else base.contiguous()
        kernels = compiled.reading(coefficients)
        if kernels is None or (base is not None and compiled.reading(base) is None):
            return None
        combination: Tensor = kernels.combined(self, coefficients, base)
        return combination

    def add_combination(self, base: Tensor, coefficients: Tensor) -> Tensor:
        combination = self._fused(coefficients, base)
        if combination is not None:
            return combination
        if self.store.chunks and base.dtype is self.store.dtype and base.dtype is self.store.compute:
            return self._sum(coefficients, base[:, None])
        return base + self._sum(coefficients, None)

    def _sum(self, coefficients: Tensor, base: Tensor | None) -> Tensor:
        with full_precision(coefficients.device):
            return self._summed(coefficients, base)

    def _summed(self, coefficients: Tensor, base: Tensor | None) -> Tensor:
        compute = self.store.compute
        if self.store.whole and self.store.chunks:
            hidden = self._hidden()
            c = coefficients if hidden is None else coefficients.masked_fill(hidden, 0.0)
            rows = self.store.chunks[0].transpose(0, 1)
            piece = c[:, None]
            whole = torch.bmm(piece, rows) if base is None else torch.baddbmm(base, piece, rows)
            return whole[:, 0].to(self.store.like.dtype)
        hidden = self._hidden() if self.store.narrow else None if self.seen is None else ~self.seen
        c = coefficients if hidden is None else coefficients.masked_fill(hidden, 0.0)
        c = c.to(compute)[:, None]
        total, start = None, 0
        for part in self._whole_units() if self.store.narrow else self._filled():
            end = start + part.shape[0]
            rows, piece = part.to(compute).transpose(0, 1), c[:, :, start:end]
            if total is not None:
                total.baddbmm_(piece, rows)  # not shared, so nothing is copied
            else:
                total = torch.bmm(piece, rows) if base is None else torch.baddbmm(base, piece, rows)
            start = end
        if total is None:
            return self.store.like.new_zeros((self.store.batch, self.store.width))
        return total[:, 0].to(self.store.like.dtype)

    def restart(self, rows: Tensor) -> TorchHistory:
        chosen = rows if self.active is None else rows & self.active
        self.store.planned = None  # of coefficients that a restart changes
        if self.seen is None and chosen.device.type == "cpu" and not chosen.numpy().any():
            return self
        return self._with(self._mask() & ~chosen[:, None], self.written, self.active, None)

    def erase(self, rows: Tensor) -> TorchHistory:
        chosen = rows if self.active is None else rows & self.active
        self.store.planned = None
        for chunk in self.store.chunks:
            if chunk.device.type == "cpu":
                chunk.index_fill_(1, torch.from_numpy(chosen.numpy().nonzero()[0]), 0.0)
            else:
                chunk.masked_fill_(chosen[None, :, None], 0.0)
        return self

    def restart_active(self) -> TorchHistory:
        mask = self._mask()
        seen = torch.zeros_like(mask) if self.active is None else mask & ~self.active[:, None]
        return self._with(seen, self.written, self.active, self.written)

    def rewind(self, count: int | Tensor) -> TorchHistory:
        written = self.written + (self.history_size - int(count)) % self.history_size  # all slots stay in use
        return self._with(self.seen, written, self.active, None)

    def skip(self) -> TorchHistory:
        self.store.gaps = True
        return self._with(self._mask(), self.written + 1, self.active, None)

    def slot(self) -> Tensor:
        if not self.written:
            return torch.zeros(self.history_size, dtype=torch.bool, device=self.store.like.device)
        return _units(self.history_size, self.store.like.device)[(self.written - 1) % self.history_size]

    def count(self) -> Tensor:
        if self.seen is None:
            return torch.full((self.store.batch,), self.used(), dtype=torch.int32, device=self.store.like.device)
        return self.seen.sum(1, dtype=torch.int32)

    def full(self) -> Tensor:
        if self.seen is None:
            filled = self.written >= self.history_size
            return torch.full((self.store.batch,), filled, dtype=torch.bool, device=self.store.like.device)
        return self.seen[:, self.written % self.history_size]

    def may_be_full(self) -> bool:
        return self.written - (self.since or 0) >= self.history_size

    def all_full(self) -> bool:
        return self.since is not None and self.written - self.since >= self.history_size

    def masked(self, active: Tensor | None) -> TorchHistory:
        if active is self.active:
            return self
        # All rows again: those that were not active have missed appends and restarts.
        return self._with(self.seen, self.written, active, None if active is None else self.since)

    def finalized(self) -> TorchHistory:
        self.store.planned = None
        return self.masked(None)

    def vectors(self) -> Tensor:
        parts = self._filled()
        if not parts:
            return self.store.like.new_zeros((self.store.batch, 0, self.store.width), dtype=self.store.dtype)
        stacked = torch.cat(parts).transpose(0, 1)
        if self.seen is None:
            return stacked
        return torch.where(self.seen[:, : self.used(), None], stacked, torch.zeros_like(stacked))

    def masking(self, seen: Tensor | None) -> TorchHistory:
        """Return this history, for all samples, with these slots seen `(batch, history_size)`; None: all of them."""
        return self._with(seen, self.written, None, self.since if seen is None else None)

    def copy(self) -> TorchHistory:
        store = self.store.with_chunks([chunk.clone() for chunk in self.store.chunks], self.store.batch)
        return TorchHistory(store, self.seen, self.written, self.active, self.since)

    def merge(self, rows: Tensor, other: History) -> TorchHistory:
        assert isinstance(other, TorchHistory)
        chosen = rows.nonzero()[:, 0]
        if chosen.shape[0] == rows.shape[0]:
            return other
        merged = self.put(chosen, other.take(chosen))
        return merged._with(merged.seen, max(self.written, other.written), self.active, None)

    def take(self, rows: Tensor) -> TorchHistory:
        chunks = [chunk.index_select(1, rows) for chunk in self.store.chunks]
        seen = None if self.seen is None else self.seen.index_select(0, rows)
        return TorchHistory(self.store.with_chunks(chunks, rows.shape[0]), seen, self.written, None, self.since)

    def put(self, rows: Tensor, part: History) -> TorchHistory:
        assert isinstance(part, TorchHistory)
        start, self.store.gaps = 0, self.store.gaps or part.store.gaps
        for i, chunk in enumerate(part.store.chunks):
            if i == len(self.store.chunks):
                make = chunk.new_zeros if self.store.narrow or part.store.gaps else chunk.new_empty
                self.store.chunks.append(make((chunk.shape[0], self.store.batch, self.store.width)))
            if self.written < start + chunk.shape[0] and part.written > self.written:
                self.store.chunks[i][max(0, self.written - start) :].zero_()  # new rows are uninitialised memory
            self.store.chunks[i].index_copy_(1, rows, chunk)
            start += chunk.shape[0]
        seen = self._mask().index_copy(0, rows, part._mask())
        return self._with(seen, part.written, self.active, None)


class RecordedHistory(History):
    """The same ring without in-place writes, for solver steps that autograd differentiates through."""

    def __init__(self, storage: Tensor, seen: Tensor, written: int, active: Tensor | None, wide: torch.dtype) -> None:
        self.storage = storage  # (batch, memory, n)
        self.seen = seen  # (batch, memory)
        self.written = written
        self.active = active
        self.wide = wide
        self.history_size = storage.shape[1]

    @classmethod
    def empty(cls, like: Tensor, history_size: int, dtype: torch.dtype, wide: torch.dtype) -> RecordedHistory:
        """Make an empty history for vectors like `like` `(batch, n)`."""
        storage = torch.zeros((like.shape[0], history_size, like.shape[1]), dtype=dtype, device=like.device)
        seen = torch.zeros(storage.shape[:2], dtype=torch.bool, device=like.device)
        return cls(storage, seen, 0, None, wide)

    def _rows(self) -> Tensor:
        return torch.where(self.seen[:, :, None], self.storage, torch.zeros_like(self.storage))

    def append(self, v: Tensor) -> RecordedHistory:
        mask = torch.zeros_like(self.seen)
        mask[:, self.written % self.history_size] = True
        if self.active is not None:
            mask = mask & self.active[:, None]
        storage = torch.where(mask[:, :, None], v.to(self.storage.dtype)[:, None], self.storage)
        return RecordedHistory(storage, self.seen | mask, self.written + 1, self.active, self.wide)

    def dot(self, v: Tensor) -> Tensor:
        many = v if v.dim() == 3 else v[:, None]
        with full_precision(v.device):
            products = torch.bmm(many.to(self.wide), self._rows().to(self.wide).transpose(1, 2))
        return products if v.dim() == 3 else products[:, 0]

    def combine(self, coefficients: Tensor) -> Tensor:
        c = torch.where(self.seen, coefficients, torch.zeros_like(coefficients))
        with full_precision(c.device):
            return torch.bmm(c.to(self.storage.dtype)[:, None], self._rows())[:, 0]

    def restart(self, rows: Tensor) -> RecordedHistory:
        chosen = rows if self.active is None else rows & self.active
        return RecordedHistory(self.storage, self.seen & ~chosen[:, None], self.written, self.active, self.wide)

    def erase(self, rows: Tensor) -> RecordedHistory:
        chosen = rows if self.active is None else rows & self.active
        storage = torch.where(chosen[:, None, None], torch.zeros_like(self.storage), self.storage)
        return RecordedHistory(storage, self.seen, self.written, self.active, self.wide)

    def rewind(self, count: int | Tensor) -> RecordedHistory:
        written = self.written + (self.history_size - int(count)) % self.history_size
        return RecordedHistory(self.storage, self.seen, written, self.active, self.wide)

    def slot(self) -> Tensor:
        mask = torch.zeros(self.history_size, dtype=torch.bool, device=self.storage.device)
        if self.written:
            mask[(self.written - 1) % self.history_size] = True
        return mask

    def count(self) -> Tensor:
        return self.seen.sum(1, dtype=torch.int32)

    def masked(self, active: Tensor | None) -> RecordedHistory:
        return RecordedHistory(self.storage, self.seen, self.written, active, self.wide)

    def vectors(self) -> Tensor:
        return self._rows()[:, : min(self.written, self.history_size)]

    def merge(self, rows: Tensor, other: History) -> RecordedHistory:
        assert isinstance(other, RecordedHistory)
        storage = torch.where(rows[:, None, None], other.storage, self.storage)
        seen = torch.where(rows[:, None], other.seen, self.seen)
        return RecordedHistory(storage, seen, max(self.written, other.written), self.active, self.wide)

    def detach(self) -> RecordedHistory:
        return RecordedHistory(self.storage.detach(), self.seen, self.written, self.active, self.wide)

    def copy(self) -> RecordedHistory:
        return self
