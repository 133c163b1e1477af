"""The native versions of linear solves on the host: GMRES, its small system, and the estimate that judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.kernels import ErrorJudged, ErrorTask, Joining, Krylov, NextJoining
from deqcore.linear.lowrank import SHARP, MultisecantInverse
from deqcore.types import Map
from deqcore_torch import functorch
from deqcore_torch.history import TorchHistory
from deqcore_torch.native import certificates, krylov, lowrank
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
    joining: NextJoining | None = None,
) -> Krylov | None:
    """Return the result of `FusedKernels.grow`, or None if these histories have no native version."""
    basis, columns = space.basis, space.columns
    if not (holds(basis, space.v) and holds(columns, space.null_vector)) or columns.store.chunk != columns.history_size:
        return None
    if steps > columns.history_size - columns.written or steps >= basis.history_size - basis.written + 1:
        return None
    work = _Growing(space, goal)
    return work.grown(image, steps, twice, shifted, together, joining)


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
        self, image: Map, steps: int, twice: bool, shifted: bool, together: bool, joining: NextJoining | None = None
    ) -> Krylov | None:
        """Take steps until no sample waits, or with `together` until one of them no longer does."""
        if not self.columns.store.chunks:
            like = self.space.null_vector.new_empty(self.waiting.shape[0], self.columns.store.width)
            self.columns.reserved(like, zeroed=False)
        asked = left = np.count_nonzero(self.waiting)
        while self.written < steps and left and not (together and left < asked):
            if joining is not None and (joined := joining()) is not None:
                self._join(joined)
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

    def _join(self, joined: Joining) -> None:
        """Begin the spaces of these samples again: with their vectors in slot 0, and as the latest vector."""
        own = joined.rows.nonzero()[0]
        chosen, norm = torch.from_numpy(own), joined.norms[own]
        v = joined.vectors.index_select(0, chosen) / torch.from_numpy(norm[:, None]).to(joined.vectors.dtype)
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


NO_SECANTS: Final = (
    *(np.empty(0, np.int64), 1, 0, everywhere(0, 0), np.empty((0, 0, 0)), np.empty((0, 0, 0))),
    *(np.empty(0, np.int8), np.empty((0, 2, 0)), np.empty((0, 2, 0))),
)
"""What `Secants.read` returns, without pairs."""


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
            certificates.secants,
            v.shape[0],
            v.numel() * (used + 2),
            *(view(v), basis.addresses(), basis.store.chunk, seen),
            *(view(self.gram.store.chunks[0]), view(self.pairs.store.chunks[0]), used, SHARP, view(out)),
        )
        return out

    def serves(self, v: Tensor) -> bool:
        """Return whether `v` `(batch, n)` can be judged by compiled code."""
        return holds(self.basis, v) and self.basis.store.batch == v.shape[0]

    def read(self) -> tuple[Any, ...]:
        """Return what compiled code reads, and memory for systems, each written when its sample is first judged."""
        basis, used = self.basis, self.pairs.used()
        if not self.kept:
            batch = basis.store.batch
            self.kept.extend((np.zeros(batch, np.int8), np.empty((batch, 2, used * used)), np.empty((batch, 2, used))))
        small = (view(history.store.chunks[0]) for history in (self.gram, self.pairs))
        return basis.addresses(), basis.store.chunk, used, masks(basis, basis)[1], *small, *self.kept


def secants(basis: Any, gram: Any, pairs: Any, whole: Callable[[], MultisecantInverse]) -> InverseJacobian | None:
    """Return the result of `FusedKernels.secants`, or None if these histories have no native version."""
    if not all(type(history) is TorchHistory and history.written for history in (basis, gram, pairs)):
        return None
    small = all(h.store.chunk == h.history_size and h.store.dtype is torch.float64 for h in (gram, pairs))
    kept = basis.store.dtype in VECTORS and basis.store.like.device.type == "cpu"
    if not small or not kept or basis.used() != pairs.used():
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


def certify(space: Krylov, image: Map, task: ErrorTask) -> ErrorJudged | None:
    """Return the result of `FusedKernels.certify`, or None if these histories have no native version."""
    v, witness = space.v, task.estimate
    if not (holds(space.basis, v) and holds(space.columns, space.null_vector) and plain(v)):
        return None
    columns, wide = space.columns, space.null_vector.dtype is torch.float64
    if not wide or columns.store.chunk != columns.history_size or task.max_vjps > columns.history_size:
        return None
    if witness is not None and not (type(witness) is Secants and witness.serves(v)):
        return None
    work = _Certifying(space, task)
    grown = work.grown(image, task.max_vjps, True, True, False)
    return None if grown is None else work.judged(grown)


class _Certifying(_Growing):
    """A space that grows until each sample is certified, or can do no more."""

    def __init__(self, space: Krylov, task: ErrorTask) -> None:
        super().__init__(space, torch.full_like(space.residual, -1.0))
        pending, goal, estimate = self.waiting.copy(), view(task.goal).copy(), task.estimate
        self.x = torch.zeros_like(space.v)
        self.systems = len(pending) * estimate.pairs.used() ** 3 if isinstance(estimate, Secants) else 0
        self.figures = [view(each).copy() for each in (task.residual, task.error, task.met)]
        self.figures.append(np.zeros_like(pending))
        self.fixed: tuple[Any, ...] = (
            *(self.null_vector, self.null_norm_sq, view(space.start), self.residual, self.can_grow, self.steps),
            *(self.waiting, pending, task.rule, float(task.target), task.rounding, SHARP),
            *(task.max_vjps, view(task.norm), goal, view(task.vjps), view(task.size)),
            *(estimate.read() if isinstance(estimate, Secants) else NO_SECANTS),
            *(estimate is not None, view(self.x), *self.figures),
        )

    def _step(self, w: Tensor, twice: bool, shifted: bool) -> None:
        super()._step(w, twice, shifted)
        basis, columns = self.basis, self.columns
        run(
            certificates.judge,
            w.shape[0],
            w.numel() * basis.written + self.systems,
            *(view(self.v), basis.addresses(), basis.store.chunk, basis.used(), self.seen),
            *(view(columns.store.chunks[0]), columns.used(), self.columns_seen),
            *self.fixed,
        )

    def judged(self, grown: Krylov) -> ErrorJudged:
        """Return the result."""
        return ErrorJudged(grown, self.x, *(torch.from_numpy(each) for each in self.figures))
