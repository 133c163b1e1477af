"""A history for solver steps that autograd differentiates through: the ring without writes in place."""

from __future__ import annotations

import torch
from torch import Tensor

from deqcore.abc.history import History
from deqcore_torch.chunks import full_precision


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
