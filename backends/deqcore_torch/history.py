"""A history that grows in place, chunk by chunk.

Storage is a list of tensors `(batch, slots, n)`: after k appends it holds k vectors, rounded up to a chunk, however
large `memory` is. Products are written as row vector times matrix: on CPUs `bmm(v, Hᵀ)` moves several times the
bytes per second of `bmm(H, v)`, and its bits do not depend on the batch size.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from deqcore.backend import History

CHUNK = 4  # slots per chunk for large vectors
SMALL = 4096  # numbers per vector up to which one chunk holds the whole memory


def select_rows(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows of `new` where `mask` holds, of `old` elsewhere, on the host: copies of rows.

    `torch.where` with a broadcast mask takes 25 times as long there (256 × 512 float32: 520 µs against 20 µs).
    """
    rows = mask.nonzero()[:, 0]
    count = rows.shape[0]
    if count == mask.shape[0]:
        return new
    if count == 0:
        return old
    if 2 * count > mask.shape[0]:
        rest = (~mask).nonzero()[:, 0]
        return new.index_copy(0, rest, old.index_select(0, rest))
    return old.index_copy(0, rows, new.index_select(0, rows))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Inside it products keep their dtype: the user's autocast belongs to f, not to the solver's coefficients."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class TorchHistory(History):
    """Ring of vectors in chunks; see `deqcore.backend.History`.

    While every sample has seen every vector (no restart, no frozen row yet) `seen` is None and no mask is applied.
    """

    def __init__(
        self,
        chunks: list[Tensor],
        memory: int,
        like: Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        wide: torch.dtype,
        seen: Tensor | None = None,
        written: int = 0,
        active: Tensor | None = None,
    ) -> None:
        self.chunks = chunks  # shared by all versions of this history; grows in place
        self.memory = memory
        self.like = like  # empty: device and dtype of what combine returns
        self.batch, self.width = shape
        self.chunk = memory if self.width <= SMALL and memory * self.width <= 16 * SMALL else CHUNK
        self.dtype = dtype
        self.wide = wide
        self.seen = seen  # (batch, memory) of bool
        self.written = written
        self.active = active

    def _with(self, seen: Tensor | None, written: int, active: Tensor | None) -> TorchHistory:
        return TorchHistory(
            self.chunks,
            self.memory,
            self.like,
            (self.batch, self.width),
            self.dtype,
            self.wide,
            seen,
            written,
            active,
        )

    def _used(self) -> int:
        return min(self.written, self.memory)

    def _mask(self) -> Tensor:
        if self.seen is not None:
            return self.seen
        mask = torch.zeros(self.batch, self.memory, dtype=torch.bool, device=self.like.device)
        mask[:, : self._used()] = True
        return mask

    def append(self, v: Tensor) -> TorchHistory:
        return self._write(v, None)

    def append_difference(self, a: Tensor, b: Tensor) -> TorchHistory:
        return self._write(a, b)

    def _write(self, v: Tensor, minus: Tensor | None) -> TorchHistory:
        slot = self.written % self.memory
        target = self._place(slot, v)
        if self.active is None and minus is not None and v.dtype is self.dtype:
            torch.sub(v, minus, out=target)
        else:
            self._copy(v if minus is None else v - minus, target)
        seen = self.seen
        if self.active is not None or seen is not None:
            seen = self._mask().clone() if self.seen is not None else self._mask()
            seen[:, slot] = True if self.active is None else seen[:, slot] | self.active
        return self._with(seen, self.written + 1, self.active)

    def _copy(self, v: Tensor, target: Tensor) -> None:
        if self.active is None:
            target.copy_(v)
            return
        if self.written < self.memory:
            target.zero_()  # nothing was written here yet, and rows that are not active must not hold garbage
        if v.device.type == "cpu":
            rows = self.active.nonzero()[:, 0]
            target.index_copy_(0, rows, v.index_select(0, rows).to(self.dtype))
        else:
            target.copy_(torch.where(self.active[:, None], v.to(self.dtype), target))

    def _place(self, slot: int, v: Tensor) -> Tensor:
        chunk, row = divmod(slot, self.chunk)
        while len(self.chunks) <= chunk:
            rows = min(self.chunk, self.memory - self.chunk * len(self.chunks))
            self.chunks.append(v.new_empty((v.shape[0], rows, v.shape[1]), dtype=self.dtype))
        return self.chunks[chunk][:, row]

    def _filled(self) -> list[Tensor]:
        """The chunks in use, cut to the slots written."""
        left, parts = self._used(), []
        for chunk in self.chunks:
            if left <= 0:
                break
            parts.append(chunk if left >= chunk.shape[1] else chunk[:, :left])
            left -= chunk.shape[1]
        return parts

    def dot(self, v: Tensor) -> Tensor:
        many = v if v.dim() == 3 else v[:, None]
        compute = self.dtype if self.dtype in (torch.float32, torch.float64) else torch.float32
        many = many.to(compute)
        with full_precision(v.device):
            parts = [torch.bmm(many, part.to(compute).transpose(1, 2)) for part in self._filled()]
        if not parts:
            return many.new_zeros((*v.shape[:-1], self.memory), dtype=self.wide)
        found = (parts[0] if len(parts) == 1 else torch.cat(parts, 2)).to(self.wide)
        missing = self.memory - found.shape[2]
        if missing:
            found = torch.nn.functional.pad(found, (0, missing))
        if self.seen is not None:
            found = found.masked_fill(~self.seen[:, None], 0.0)
        return found if v.dim() == 3 else found[:, 0]

    def combine(self, coefficients: Tensor) -> Tensor:
        return self._sum(coefficients, None)

    def add_combination(self, base: Tensor, coefficients: Tensor) -> Tensor:
        if self.written and base.dtype is self.dtype and base.dtype in (torch.float32, torch.float64):
            return self._sum(coefficients, base[:, None])
        return base + self._sum(coefficients, None)

    def _sum(self, coefficients: Tensor, total: Tensor | None) -> Tensor:
        compute = self.dtype if self.dtype in (torch.float32, torch.float64) else torch.float32
        c = coefficients if self.seen is None else coefficients.masked_fill(~self.seen, 0.0)
        c = c.to(compute)[:, None]
        start = 0
        for part in self._filled():
            end = start + part.shape[1]
            rows, piece = part.to(compute), c[:, :, start:end]
            with full_precision(rows.device):
                total = torch.bmm(piece, rows) if total is None else torch.baddbmm(total, piece, rows)
            start = end
        if total is None:
            return self.like.new_zeros((self.batch, self.width))
        return total[:, 0].to(self.like.dtype)

    def restart(self, rows: Tensor) -> TorchHistory:
        chosen = rows if self.active is None else rows & self.active
        if self.seen is None and not rows.is_cuda and not bool(chosen.any()):
            return self
        return self._with(self._mask() & ~chosen[:, None], self.written, self.active)

    def slot(self) -> Tensor:
        mask = torch.zeros(self.memory, dtype=torch.bool, device=self.like.device)
        if self.written:
            mask[(self.written - 1) % self.memory] = True
        return mask

    def count(self) -> Tensor:
        if self.seen is None:
            return torch.full((self.batch,), self._used(), dtype=torch.int32, device=self.like.device)
        return self.seen.sum(1, dtype=torch.int32)

    def full(self) -> Tensor:
        if self.seen is None:
            filled = self.written >= self.memory
            return torch.full((self.batch,), filled, dtype=torch.bool, device=self.like.device)
        return self.seen[:, self.written % self.memory]

    def may_be_full(self) -> bool:
        return self.written >= self.memory

    def with_active(self, active: Tensor | None) -> TorchHistory:
        return self if active is self.active else self._with(self.seen, self.written, active)

    def vectors(self) -> Tensor:
        parts = self._filled()
        if not parts:
            return self.like.new_zeros((self.batch, 0, self.width), dtype=self.dtype)
        stacked = torch.cat(parts, 1)
        if self.seen is None:
            return stacked
        return torch.where(self.seen[:, : self._used(), None], stacked, torch.zeros_like(stacked))

    def copy(self) -> TorchHistory:
        fresh = self._with(self.seen, self.written, self.active)
        fresh.chunks = [chunk.clone() for chunk in self.chunks]
        return fresh

    def take(self, rows: Tensor) -> TorchHistory:
        fresh = TorchHistory(
            [chunk.index_select(0, rows) for chunk in self.chunks],
            self.memory,
            self.like,
            (rows.shape[0], self.width),
            self.dtype,
            self.wide,
            None if self.seen is None else self.seen.index_select(0, rows),
            self.written,
        )
        return fresh

    def put(self, rows: Tensor, part: History) -> TorchHistory:
        assert isinstance(part, TorchHistory)
        start = 0
        for i, chunk in enumerate(part.chunks):
            if i == len(self.chunks):
                self.chunks.append(chunk.new_empty((self.batch, *chunk.shape[1:])))
            if self.written < start + chunk.shape[1] and part.written > self.written:
                self.chunks[i][:, max(0, self.written - start) :].zero_()  # rows that saw nothing hold no garbage
            self.chunks[i].index_copy_(0, rows, chunk)
            start += chunk.shape[1]
        seen = self._mask().index_copy(0, rows, part._mask())
        return self._with(seen, part.written, self.active)


class RecordedHistory(History):
    """The same ring without writes in place, for solver steps that autograd differentiates through."""

    def __init__(self, storage: Tensor, seen: Tensor, written: int, active: Tensor | None, wide: torch.dtype) -> None:
        self.storage = storage  # (batch, memory, n)
        self.seen = seen  # (batch, memory)
        self.written = written
        self.active = active
        self.wide = wide
        self.memory = storage.shape[1]

    @classmethod
    def empty(cls, like: Tensor, memory: int, dtype: torch.dtype, wide: torch.dtype) -> RecordedHistory:
        """No vectors yet, for vectors like `like` `(batch, n)`."""
        storage = torch.zeros((like.shape[0], memory, like.shape[1]), dtype=dtype, device=like.device)
        seen = torch.zeros(storage.shape[:2], dtype=torch.bool, device=like.device)
        return cls(storage, seen, 0, None, wide)

    def _rows(self) -> Tensor:
        return torch.where(self.seen[:, :, None], self.storage, torch.zeros_like(self.storage))

    def append(self, v: Tensor) -> RecordedHistory:
        mask = torch.zeros_like(self.seen)
        mask[:, self.written % self.memory] = True
        if self.active is not None:
            mask = mask & self.active[:, None]
        storage = torch.where(mask[:, :, None], v.to(self.storage.dtype)[:, None], self.storage)
        return RecordedHistory(storage, self.seen | mask, self.written + 1, self.active, self.wide)

    def dot(self, v: Tensor) -> Tensor:
        many = v if v.dim() == 3 else v[:, None]
        with full_precision(v.device):
            found = torch.bmm(many.to(self.wide), self._rows().to(self.wide).transpose(1, 2))
        return found if v.dim() == 3 else found[:, 0]

    def combine(self, coefficients: Tensor) -> Tensor:
        c = torch.where(self.seen, coefficients, torch.zeros_like(coefficients))
        with full_precision(c.device):
            return torch.bmm(c.to(self.storage.dtype)[:, None], self._rows())[:, 0]

    def restart(self, rows: Tensor) -> RecordedHistory:
        chosen = rows if self.active is None else rows & self.active
        return RecordedHistory(self.storage, self.seen & ~chosen[:, None], self.written, self.active, self.wide)

    def slot(self) -> Tensor:
        mask = torch.zeros(self.memory, dtype=torch.bool, device=self.storage.device)
        if self.written:
            mask[(self.written - 1) % self.memory] = True
        return mask

    def count(self) -> Tensor:
        return self.seen.sum(1, dtype=torch.int32)

    def with_active(self, active: Tensor | None) -> RecordedHistory:
        return RecordedHistory(self.storage, self.seen, self.written, active, self.wide)

    def vectors(self) -> Tensor:
        return self._rows()[:, : min(self.written, self.memory)]

    def copy(self) -> RecordedHistory:
        return self
