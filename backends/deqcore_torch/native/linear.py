"""The native versions of linear solves on the host: GMRES, its small system, and the estimate that judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.kernels import Krylov
from deqcore.linear.lowrank import SHARP, MultisecantInverse
from deqcore.types import Map
from deqcore_torch import functorch
from deqcore_torch.history import TorchHistory
from deqcore_torch.native import krylov, lowrank
from deqcore_torch.native.pool import run
from deqcore_torch.native.views import VECTORS, everywhere, holds, masks, plain, room, view


def grow(
    space: Krylov,
    image: Map,
    goal: Tensor,
    steps: int,
    *,
    twice: bool,
    shifted: bool,
    together: bool,
    joining: Callable[[], tuple[Any, Tensor, Any] | None] | None = None,
) -> Krylov | None:
    """Return the result of `FusedKernels.grow`, or None if these histories have no native version."""
    basis, columns = space.basis, space.columns
    if not (holds(basis, space.v) and holds(columns, space.null_vector)) or columns.store.chunk != columns.history_size:
        return None
    if steps > columns.history_size - columns.written or steps >= basis.history_size - basis.written + 1:
        return None
    work = _Growing(space, goal)
    return work.grown(image, steps, twice, shifted, together, joining or _none)


def _none() -> None:
    """Return that no sample joins."""


class _Growing:
    """A Krylov space whose small arrays change in place; those of the space that it began as stay what they are."""

    def __init__(self, space: Krylov, goal: Tensor) -> None:
        self.space = space
        self.basis: TorchHistory = space.basis.masked(None)  # type: ignore[assignment]
        self.columns: TorchHistory = space.columns.masked(None)  # type: ignore[assignment]
        self.seen, self.columns_seen = _seen(self.basis), _seen(self.columns)
        self.place = view(space.source_slot).argmax(1)
        self.null_vector = view(space.null_vector).copy()
        self.null_norm_sq, self.residual = view(space.null_norm_sq).copy(), view(space.residual).copy()
        self.can_grow, self.steps = view(space.can_grow).copy(), view(space.steps).copy()
        self.goal = view(goal.to(torch.float64))
        self.waiting = self.can_grow & (self.residual > self.goal)
        self.v, self.start, self.written = space.v, view(space.start).copy(), 0

    def grown(
        self, image: Map, steps: int, twice: bool, shifted: bool, together: bool, joining: Callable[[], Any]
    ) -> Krylov | None:
        """Take steps until no sample waits, or with `together` until one of them no longer does."""
        if not self.columns.store.chunks:
            like = self.space.null_vector.new_empty(self.waiting.shape[0], self.columns.store.width)
            self.columns.reserved(like, zeroed=False)
        asked = left = np.count_nonzero(self.waiting)
        while self.written < steps and left and not (together and left < asked):
            if (joined := joining()) is not None:
                self._join(*joined)
            w = image(self.v).contiguous()  # products of f come in any layout
            if not self.written and (w.dtype is not self.v.dtype or functorch.is_tracked(w) or not plain(w)):
                return None
            self._step(w, twice, shifted)
            left = np.count_nonzero(self.waiting)
        return self._space() if self.written else self.space

    def _step(self, w: Tensor, twice: bool, shifted: bool) -> None:
        basis, columns = self.basis, self.columns
        following = basis.reserved(w)
        run(
            krylov.arnoldi,
            w.shape[0],
            w.numel() * (basis.written + 2),
            *(view(w), view(self.v), basis.addresses(), basis.store.chunk, basis.written, self.seen),
            *(view(columns.store.chunks[0]), columns.written, self.columns_seen, self.place),
            *(self.null_vector, self.null_norm_sq, self.residual, self.goal, self.can_grow, self.steps, self.waiting),
            *(twice, shifted, float(torch.finfo(w.dtype).eps), basis.written, following.numpy()),
        )
        self.v, self.written = following, self.written + 1
        self.basis, self.columns = basis.appended(), columns.appended()

    def _join(self, rows: Any, r: Tensor, norm: Any) -> None:
        """Begin the spaces of the rows again with their vectors in r: in slot 0, and as the latest vector."""
        own = rows.nonzero()[0]
        chosen, norm = torch.from_numpy(own), norm[own]
        v = r.index_select(0, chosen) / torch.from_numpy(norm[:, None]).to(r.dtype)
        self.basis.store.chunks[0][0].index_copy_(0, chosen, v)
        self.v.index_copy_(0, chosen, v)
        self.columns.store.chunks[0][: self.columns.written].index_fill_(1, chosen, 0.0)
        self.seen[own], self.columns_seen[own], self.null_vector[own] = False, False, 0.0
        self.seen[own, 0], self.null_vector[own, 0], self.null_norm_sq[own], self.place[own] = True, 1.0, 1.0, 0
        self.start[own] = self.residual[own] = norm
        self.can_grow[own] = self.waiting[own] = True

    def _space(self) -> Krylov:
        source_slot = np.zeros(self.null_vector.shape)
        source_slot[np.arange(len(self.place)), self.place] = 1.0
        return Krylov(
            basis=_history(self.basis, self.seen),
            columns=_history(self.columns, self.columns_seen),
            v=self.v,
            source_slot=torch.from_numpy(source_slot),
            null_vector=torch.from_numpy(self.null_vector),
            null_norm_sq=torch.from_numpy(self.null_norm_sq),
            start=torch.from_numpy(self.start),
            residual=torch.from_numpy(self.residual),
            can_grow=torch.from_numpy(self.can_grow),
            steps=torch.from_numpy(self.steps),
            dimension=self.space.dimension + self.written,
        )


def _seen(history: TorchHistory) -> Any:
    """Return which slots each sample has seen, for writing."""
    if history.seen is not None:
        return view(history.seen).copy()
    seen = np.zeros((history.store.batch, history.history_size), np.bool_)
    seen[:, : history.used()] = True
    return seen


def _history(history: TorchHistory, seen: Any) -> TorchHistory:
    """Return the history with these slots seen."""
    whole = bool(seen[:, : history.used()].all())
    return history.masking(None if whole else torch.from_numpy(seen))


def plain_step(x: Tensor, r: Tensor, image: Tensor, norm: Any, rows: Any) -> Any | None:
    """Return the result of `FusedKernels.plain_step`, or None if x is of another kind than the image."""
    if not plain(x) or x.dtype is not image.dtype or r.dtype is not image.dtype:
        return None
    lengths = norm.copy()
    run(krylov.plain_step, len(norm), 4 * x.numel(), view(image), view(r), view(x), norm, rows, lengths)
    return lengths


def least_squares(space: Krylov, inverse: Tensor | bool) -> tuple[Tensor, ...] | None:
    """Return the result of `FusedKernels.least_squares`, or None if this history has no native version."""
    columns = space.columns
    if not holds(columns, space.null_vector) or columns.store.chunk != columns.history_size or not columns.written:
        return None
    coefficients = room(space.null_vector)
    batch = coefficients.shape[0]
    figures = torch.empty(5, batch, dtype=torch.float64).unbind(0)
    _, seen = masks(columns, columns)
    rows = view(inverse) if isinstance(inverse, Tensor) else everywhere(batch) if inverse else ~everywhere(batch)
    run(
        krylov.least_squares,
        batch,
        coefficients.numel() * columns.used(),
        *(view(space.null_vector), view(columns.store.chunks[0]), seen, columns.used(), view(space.null_norm_sq)),
        *(rows, *(view(array) for array in (coefficients, *figures))),
    )
    return coefficients, *figures


@dataclass(frozen=True)
class Secants(InverseJacobian):
    """The multi-secant estimate of Broyden's pairs; products that judge few vectors do not form its system in full.

    Attributes:
        basis: the residuals.
        gram: rows of the lower triangle of their Gram matrix.
        pairs: coefficients of steps and differences.
        whole: makes the estimate of the core.
        kept: the factored systems of the samples that were judged.
    """

    basis: TorchHistory
    gram: TorchHistory
    pairs: TorchHistory
    whole: Callable[[], MultisecantInverse]
    kept: list[Any] = field(default_factory=list, repr=False, compare=False)

    def apply(self, v: Tensor) -> Tensor:
        """See `MultisecantInverse`."""
        return self.whole().apply(v)

    def apply_transpose(self, v: Tensor) -> Tensor:
        """See `MultisecantInverse`."""
        return self.whole().apply_transpose(v)

    def prepared(self) -> InverseJacobian:
        """See `MultisecantInverse`."""
        return self.whole().prepared()

    def apply_transpose_unregularised(self, v: Tensor) -> Tensor:
        """See `MultisecantInverse`."""
        v = v.contiguous()
        if not plain(v) or v.dtype is not self.basis.store.dtype or functorch.is_tracked(v):
            return self.whole().apply_transpose_unregularised(v)
        out, basis = room(v), self.basis
        seen = masks(basis, basis)[1]
        used = self.pairs.used()
        run(
            krylov.secants,
            v.shape[0],
            v.numel() * (used + 2),
            *(view(v), basis.addresses(), basis.store.chunk, seen),
            *(view(self.gram.store.chunks[0]), view(self.pairs.store.chunks[0]), used, SHARP, view(out)),
        )
        return out

    def systems(self) -> list[Any]:
        """Return memory for the system of each sample, which is written when the sample is first judged."""
        if not self.kept:
            batch, p = self.basis.store.batch, self.pairs.used()
            state, small = np.zeros(batch, np.int8), (np.empty((batch, p, p)), np.empty((batch, p, p)))
            self.kept.extend((state, *small, np.empty((batch, 2, p))))
        return self.kept


def secants(basis: Any, gram: Any, pairs: Any, whole: Callable[[], MultisecantInverse]) -> InverseJacobian | None:
    """Return the result of `FusedKernels.secants`, or None if these histories have no native version."""
    if not all(type(history) is TorchHistory and history.written for history in (basis, gram, pairs)):
        return None
    small = all(h.store.chunk == h.history_size and h.store.dtype is torch.float64 for h in (gram, pairs))
    kept = basis.store.dtype in VECTORS and basis.written <= basis.history_size
    if not small or not kept or basis.used() != pairs.used() or basis.store.like.device.type != "cpu":
        return None
    return Secants(basis, gram, pairs, whole)


def low_rank(basis: Any, left: Any, right: Any, v: Tensor) -> Tensor | None:
    """Return the result of `FusedKernels.low_rank`, or None if these histories have no native version."""
    if not holds(basis, v) or not basis.written:
        return None
    small = [history for history in (left, right) if type(history) is TorchHistory]
    if not all(h.store.chunk == h.history_size and h.written == basis.written for h in small) or len(small) < 2:
        return None
    out = room(v)
    run(
        lowrank.corrected,
        v.shape[0],
        v.numel() * (basis.used() + 2),
        *(view(v), basis.addresses(), basis.store.chunk, basis.used(), masks(basis, basis)[1]),
        *(view(left.store.chunks[0]), view(right.store.chunks[0]), view(out)),
    )
    return out


def reach(estimate: InverseJacobian, space: Krylov, rows: Tensor) -> Tensor | None:
    """Return the result of `FusedKernels.reach`, or None if this estimate or space has no native version."""
    v = space.v
    if type(estimate) is not Secants or not holds(space.basis, v) or not holds(estimate.basis, v):
        return None
    if estimate.basis.store.batch != v.shape[0] or space.null_vector.dtype is not torch.float64:
        return None
    basis, secant = space.basis, estimate.basis
    wanted, norm = view(rows), torch.empty(v.shape[0], dtype=torch.float64)
    run(
        krylov.reach,
        v.shape[0],
        int(np.count_nonzero(wanted)) * v.shape[1] * (secant.used() + basis.used()),
        *(view(v), basis.addresses(), basis.store.chunk, basis.used(), masks(basis, basis)[1]),
        *(view(space.null_vector), view(space.null_norm_sq), view(space.start), wanted),
        *(secant.addresses(), secant.store.chunk, masks(secant, secant)[1]),
        *(view(estimate.gram.store.chunks[0]), view(estimate.pairs.store.chunks[0]), SHARP),
        *(*estimate.systems(), view(norm)),
    )
    return norm
