"""Plain steps for the samples whose Krylov space gains little, where decisions are made on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.kernels import Joining, Krylov
from deqcore.linear.figures import Figures
from deqcore.linear.gmres import PROGRESS, KrylovSpace, LinearSolution, ended, visible
from deqcore.linear.opening import STEPS, planned_steps, rounding_of_steps
from deqcore.types import Array, Map

MANY: Final = 512
"""Smallest n. With fewer unknowns the basis costs less than calls do, and GMRES gains more at the end of a solve."""

LOOK: Final = 4
"""Dimensions of a Krylov space after which its sample may leave it: a twentieth of the passes of 18 dimensions."""

LATE: Final = 2
"""The latest of them, which decide."""

INSIDE: Final = 0.06
"""Part of the squared norms of the products J v that may lie in the space before them, for a sample that leaves it. It
is 0.02 for random matrices of 512 unknowns, and 0.5 for symmetric ones, where GMRES takes half of the products of plain
steps."""

MORE: Final = 4 / 3
"""Products that a sample may need in all, in those expected when it leaves. One that would need more returns."""


def plain_or_gmres(
    backend: Backend, product: Map, b: Array, *, rtol: float, max_steps: int, reorthogonalize: bool, restart: int
) -> LinearSolution:
    """Solve (I − J) x = b by GMRES, which samples leave for plain steps x ← x + r, r ← J r where these do as well.

    A plain step passes over three vectors, a step of GMRES over its basis. Where J turns each vector out of the space
    before it, GMRES gains a factor √(1 − ρ²) at most on any number of plain steps of rate ρ. The Hessenberg matrix of
    `LOOK` steps shows whether it does. A sample leaves if it does, and if its rate would bring it to the goal within
    the steps that `RATE` needs, but not within another `LOOK`. One that later contracts more slowly, so that it would
    need a third more than expected, returns to GMRES from where it is. All samples share each product: those with plain
    steps ride along with those of GMRES.

    Args:
        backend: the backend of these arrays, with views of them on the host.
        product: `v ↦ J v` on `(batch, n)`.
        b: right-hand side `(batch, n)`, of the dtype of norms.
        rtol: stop when ‖b − A x‖ ≤ rtol·‖b‖.
        max_steps: products of GMRES at most.
        reorthogonalize: see `gmres`.
        restart: see `gmres`; from `LOOK` to `max_steps`.
    """
    figures = Figures(backend, on_host=True)
    given = figures.given
    space = KrylovSpace(backend, product, reorthogonalize=reorthogonalize, shifted=True)
    size = backend.norm(b)
    goal = rtol * backend.to_accum_dtype(size)
    k = space.grow(space.begin(b, restart, size), goal, LOOK)
    with figures.errstate():
        plain = _Plain(figures, space, k, goal, rtol)
        riding = replace(space, product=plain.riding)
        k = k._replace(can_grow=given(plain.others))
        if plain.others.any():
            k = riding.grow(k, goal, restart - LOOK, joining=plain.returned)
            plain.begin(*ended(space, k, None))
        spent = plain.restarts(space, k, plain.others, max_steps - restart)
        while (returned := plain.until_one_returns()) is not None:
            rows, r = returned.rows, returned.vectors
            k = space.begin(backend.select(given(rows), r, backend.xp.zeros_like(r)), restart)
            k = riding.grow(k, goal, restart, joining=plain.returned)
            plain.add(k, *ended(space, k, None))
            spent = spent | plain.restarts(space, k, rows, max_steps - restart)
        residual = plain.residuals()
        converged = (residual <= plain.goal) & np.isfinite(residual)
    fields = residual, plain.products + plain.steps, converged, spent
    return LinearSolution(visible(backend, plain.x, size), *map(given, fields))


class _Plain:
    """The samples that take plain steps, and how far they are. Figures `(batch,)` are NumPy's.

    Attributes:
        x: the solution so far `(batch, n)`.
        r: residuals of the samples that run or wait, and anything finite elsewhere.
        residual: what is left after the last Krylov space of a sample.
        leaves: the samples that left the first space.
        others: those that still grow in it.
        running: those that take plain steps.
        waits: those that wait for a Krylov space.
        joined: those that did.
        steps: plain steps taken.
        products: products of Krylov spaces that have ended.
    """

    x: Array
    residual: Any

    def __init__(self, figures: Figures, space: KrylovSpace, k: Krylov, goal: Array, rtol: float) -> None:
        self.figures, self.backend, self.product = figures, space.backend, space.product
        self.goal, self.norm = figures.read(goal), figures.read(k.residual)
        turning, rate = _turning(figures.read(space.hessenberg(k)[0]))
        expected = LOOK + np.log(self.goal / self.norm) / np.log(rate)
        growing = figures.read(k.can_grow) & (self.norm > self.goal)
        soon, late = expected < 2 * LOOK, expected > planned_steps(rtol)
        self.leaves = growing & turning & (rate < 1.0) & ~soon & ~late
        self.others, self.running = growing & ~self.leaves, self.leaves
        self.earlier, self.planned = self.norm / rate, np.minimum(np.ceil(MORE * expected), STEPS) - LOOK
        self.steps = self.products = np.zeros(growing.shape, np.int32)
        self.waits = self.joined = np.zeros_like(growing)
        if self.leaves.any() or not growing.any():
            self.x, residual = ended(space, k, None)
            self.residual = figures.read(residual)
        self.r = space.residual_vector(k, figures.given(self.leaves)) if self.leaves.any() else k.v

    def riding(self, v: Array) -> Array:
        """Return the product with `v`, and take a plain step in the rows of the samples that run."""
        if not self.running.any():
            return self.product(v)
        image = self.product(self.backend.select(self.figures.given(self.running), self.r, v))
        self._step(image)
        return image

    def begin(self, x: Array, residual: Array) -> None:
        """Take the solution of the first Krylov space; that of a sample that joined it again is what it adds."""
        select, given = self.backend.select, self.figures.given
        if not self.leaves.any():
            self.x, self.residual = x, self.figures.read(residual)
            return
        self.x = select(given(self.leaves), select(given(self.joined), self.x + x, self.x), x)
        self.residual = np.where(self.leaves & ~self.joined, self.residual, self.figures.read(residual))

    def add(self, k: Krylov, x: Array, residual: Array) -> None:
        """Add the solution of another Krylov space, which is zero for samples that are not in it."""
        self.x = self.x + x
        self.residual = np.where(self.figures.read(k.start) > 0, self.figures.read(residual), self.residual)

    def restarts(self, space: KrylovSpace, k: Krylov, whole: Any, most: int) -> Any:
        """Count the products of a space that has ended, and let samples wait that it brought nearer to their goal.

        Those that were not in the `whole` space wait, too: it may have had one dimension left for them. Return the
        samples that spent more than `most` products, and do not wait. Those before a sample left do not count.
        """
        left, start = self.figures.read(k.residual), self.figures.read(k.start)
        self.products = self.products + self.figures.read(k.steps)
        slow = self.figures.read(k.can_grow) & (left > self.goal) & (~whole | (left <= PROGRESS * start))
        again = slow & (self.products - LOOK * self.leaves <= most)
        if again.any():
            r = space.residual_vector(k, self.figures.given(again))
            self.r = self.backend.select(self.figures.given(again), r, self.r)
            self.waits = self.waits | again
        return slow & ~again

    def until_one_returns(self) -> Joining | None:
        """Take plain steps, and return what `returned` does, or None if all samples ended."""
        while self.running.any() and not self.waits.any():
            self._step(self.product(self.r))
        return self.returned()

    def returned(self) -> Joining | None:
        """Return the samples that wait for GMRES, with their residuals. They wait no longer."""
        if not self.waits.any():
            return None
        rows = self.waits
        self.waits, self.joined = np.zeros_like(rows), self.joined | rows
        return Joining(rows, self.r, self.norm)

    def residuals(self) -> Any:
        """Return the residuals, but no less than the rounding of A x where the Krylov space does not know x."""
        several = self.leaves | self.joined
        if not several.any():
            return self.residual
        rounding = self.figures.read(rounding_of_steps(self.backend, self.x, self.x))
        left = np.where(self.joined, self.residual, self.norm)
        return np.where(several, np.maximum(left, rounding), self.residual)

    def _step(self, image: Array) -> None:
        """Add r to x and replace it by its `image`, where that is shorter; decide which samples continue."""
        backend, given, before, running = self.backend, self.figures.given, self.norm, self.running
        norm = None if backend.kernels is None else backend.kernels.plain_step(self.x, self.r, image, before, running)
        if norm is None:
            norm = self.figures.read(backend.to_accum_dtype(backend.norm(image)))
            self.x = backend.select(given(running & (norm < before)), self.x + self.r, self.x)
        taken = running & (norm < before)  # False for NaN
        self.steps = self.steps + running
        self.norm = np.where(taken, norm, before)
        ahead = norm * (norm / self.earlier) ** ((self.planned - self.steps) / 2)
        self.earlier, self.running = before, taken & (norm > self.goal) & (ahead <= self.goal)
        self.waits = self.waits | (running & ~self.running & (self.norm > self.goal))
        self.r = backend.select(given(taken), image, self.r)


def _turning(h: Any) -> tuple[Any, Any]:
    """Return whether J turns the latest vectors of a space out of it, and its rate on them, both `(batch,)`.

    Args:
        h: Hessenberg matrices of I − J `(batch, k + 1, k)`.
    """
    squares = np.square(np.eye(*h.shape[1:]) - h)
    whole = squares.sum(axis=1)
    inside = whole - np.diagonal(squares[:, 1:], axis1=1, axis2=2)
    latest = whole[:, -LATE:].sum(axis=1)
    return inside[:, -LATE:].sum(axis=1) <= INSIDE * latest, np.sqrt(latest / LATE)
