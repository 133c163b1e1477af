"""A history that grows in place, chunk by chunk; `chunks` says how its vectors lie in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqcore.abc.history import History
from deqcore_torch import compiled
from deqcore_torch.chunks import CHUNK, Store, full_precision, one_hot_masks, products, unwritten_masks


class TorchHistory(History):
    """A ring of vectors in chunks; see `deqcore.abc.history.History`.

    While every sample has seen every vector (no restart, no frozen row yet) `seen` is None and no mask is applied. The
    host counts appends: if it knows since which append the active samples hold every vector, and none before, it knows
    without reading the device when they are full.
    """

    __slots__ = ("active", "history_size", "seen", "since", "store", "written")

    def __init__(
        self, store: Store, seen: Tensor | None, written: int, active: Tensor | None, since: int | None = None
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
        return cls(Store([], history_size, like[:0], tuple(like.shape), dtype, wide), None, 0, None, 0)

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
            else unwritten_masks(self.history_size, self.store.like.device)[self.written]
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

    def skip(self, count: int | Tensor = 1) -> TorchHistory:
        self.store.gaps = True
        return self._with(self._mask(), self.written + int(count), self.active, None)

    def slot(self) -> Tensor:
        if not self.written:
            return torch.zeros(self.history_size, dtype=torch.bool, device=self.store.like.device)
        return one_hot_masks(self.history_size, self.store.like.device)[(self.written - 1) % self.history_size]

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
