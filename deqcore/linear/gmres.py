"""Batched, matrix-free GMRES on a History, with right preconditioning and an estimate of the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.kernels import Krylov, NextJoining
from deqcore.linear.norms import orthogonalize
from deqcore.types import Array, Map


class LeastSquares(NamedTuple):
    """The minimiser y of ‖β e₀ − H̄ y‖, and the size of H̄ y's parts. All in the wide dtype, those but y `(batch,)`.

    Attributes:
        y: in the slots of the basis `(batch, m + 1)`.
        size: ‖y‖, which is that of the solution where there is no preconditioner.
        inverse_norm: 1/σ_min(H̄), a lower bound of ‖(A M)^-1‖: what the space has seen of it.
        column_norm: largest norm of a column of H̄.
        latest: the residual after the last step over that before it; 1 where there was no step.
        best: the least of these ratios of the steps before, 1 where there was none.
    """

    y: Array
    size: Array
    inverse_norm: Array
    column_norm: Array
    latest: Array
    best: Array


class LinearSolution(NamedTuple):
    """What GMRES found.

    Attributes:
        x: solution `(batch, n)`.
        residual: ‖b − A x‖ per sample, by the recurrence, `(batch,)`.
        products: products with A per sample, `(batch,)` int32.
        converged: `(batch,)` of bool.
        spent: whether the budget is used up, `(batch,)` of bool.
    """

    x: Array
    residual: Array
    products: Array
    converged: Array
    spent: Array


def gmres(
    backend: Backend,
    product: Map,
    b: Array,
    x0: Array | None = None,
    r0: Array | None = None,
    *,
    rtol: float | Array,
    max_steps: int,
    precondition: Map | None = None,
    reorthogonalize: bool = True,
    check_every: int | str = "auto",
    restart: int | None = None,
    shifted: bool = False,
) -> LinearSolution:
    """Solve A x = b for each sample, with A given by its product.

    Every sample has a Krylov space of its own and stops at the first step that meets its tolerance: the result does
    not depend on its batch mates, and no sample can make another fail.

    Args:
        backend: whose arrays these are.
        product: `v ↦ A v` on `(batch, n)`; called once per step for the whole batch.
        b: right-hand side `(batch, n)`.
        x0: start `(batch, n)`, default zero (which saves one product). A sample for which zero is nearer begins there:
            what rounding leaves of a residual is relative to the start, and a poor estimate's may be 1e5 times x.
        r0: b − A x0 where it is known, which saves the product of a start; no sample then begins at zero.
        rtol: stop when ‖b − A x‖ ≤ rtol·‖b‖.
        max_steps: products at most, without the one that a start takes.
        precondition: `v ↦ M v` with M ≈ A^-1, applied from the right, so that residuals stay true ones.
        reorthogonalize: project again where products cancel (`orthogonalize`), so that the basis stays
            orthogonal to rounding.
        check_every: see `Backend.loop`.
        restart: dimensions of one Krylov space at most. The next space begins at the residual that the last one left,
            and a sample stops (not converged) when a whole space leaves more than `PROGRESS` of the residual. None: one
            space of `max_steps`.
        shifted: A = I − J, and `product` is `v ↦ J v`. The Krylov space of A is that of J, so that no step
            subtracts, if each vector is projected again where products cancel.

    Source: Saad & Schultz (1986), "GMRES: a generalized minimal residual algorithm"; twice is enough: Giraud et al.
    (2005).
    """
    space = KrylovSpace(backend, product, precondition, reorthogonalize, check_every, shifted)
    size = backend.norm(b)
    goal = rtol * backend.to_accum_dtype(size)
    r = b
    if r0 is not None:
        r = r0
    elif x0 is not None:
        r = b - space.apply(x0)
        nearer = backend.norm(r) <= size  # False for NaN, too
        x0, r = backend.select(nearer, x0, backend.xp.zeros_like(x0)), backend.select(nearer, r, b)
    if restart is not None and restart < max_steps:
        x, residual, products = _restarted(space, x0, r, goal, max_steps, restart)
    else:
        k = space.grow(space.begin(r, max_steps, size if r is b else None), goal, max_steps)
        x, residual = ended(space, k, x0)
        products = k.steps
    return LinearSolution(
        x=visible(backend, x, size),
        residual=residual,
        products=products if x0 is None or r0 is not None else products + 1,
        converged=(residual <= goal) & backend.xp.isfinite(residual),
        spent=products >= max_steps,
    )


def visible(backend: Backend, x: Array, size: Array) -> Array:
    """`x` with NaN where ‖b‖ is not finite: such a vector is in no basis, and zero would look like a solution."""
    finite = backend.xp.isfinite(size)
    if backend.known_all(finite):
        return x
    return backend.select(finite, x, backend.xp.full_like(x, float("nan")))


PROGRESS = 0.9
"""Share of the residual that a whole Krylov space may leave; who leaves more has stalled."""


class _Cycle(NamedTuple):
    """Where restarted GMRES stands. `k` is a space that has not grown yet."""

    x: Array
    k: Krylov
    residual: Array
    products: Array
    left: Array | int  # products that the budget still allows


def _restarted(
    space: KrylovSpace, x0: Array | None, r: Array, goal: Array, max_steps: int, restart: int
) -> tuple[Array, Array, Array]:
    """x, ‖b − A x‖ and the products spent, by spaces of at most `restart` dimensions.

    A restart takes no product: the basis gives the residual vector that it leaves, except for the rounding of A x. No
    residual below that is believed.
    """
    xp = space.backend.xp

    def unfinished(c: _Cycle) -> Array:
        return xp.any(c.k.can_grow & (c.residual > goal))

    def cycle(c: _Cycle) -> _Cycle:
        k = space.grow(c.k, goal, xp.where(c.left < restart, c.left, restart + 0 * c.left))
        x, residual = ended(space, k, c.x)
        going = k.can_grow & (k.residual > goal) & (k.residual <= PROGRESS * c.residual)
        left = c.left - k.dimension
        again = going & (left > 0)
        following = space.backend.cond(again, lambda old: space.begin(space.residual_vector(old), restart), k)
        following = following._replace(can_grow=following.can_grow & again)
        return _Cycle(x, following, xp.where(c.k.can_grow, residual, c.residual), c.products + k.steps, left)

    k = space.begin(r, restart)
    budget = 0 * k.dimension + max_steps
    start = _Cycle(xp.zeros_like(r) if x0 is None else x0, k, k.residual, k.steps, budget)
    end = space.backend.loop(unfinished, cycle, start, -(-max_steps // restart), 1)
    return end.x, end.residual, end.products


def ended(space: KrylovSpace, k: Krylov, x0: Array | None) -> tuple[Array, Array]:
    """Return the solution from `x0` and the size of its residual."""
    fit = space.least_squares(k, inverse=False)
    update = space.solution(k, fit)
    x = update if x0 is None else x0 + update
    if space.precondition is not None:
        return x, k.residual
    size = fit.size if x0 is None else space.backend.to_accum_dtype(space.backend.norm(x))
    return x, space.trusted(k, size, fit.column_norm)


@dataclass(frozen=True)
class KrylovSpace:
    """Arnoldi's process on A M, with the least residual tracked and the minimiser formed on demand.

    Instead of rotating the Hessenberg matrix H̄ in every step, the loop carries the one vector ν with νᵀH̄ = 0, from
    which the least residual is β ν₀/‖ν‖: O(k) work a step instead of O(k²), and one small solve at the end.

    Source: Ayachour (2003), "A fast implementation for GMRES method".
    """

    backend: Backend
    product: Map
    precondition: Map | None = None
    reorthogonalize: bool = True
    check_every: int | str = "auto"
    shifted: bool = False  # A = I − J, and `product` is v ↦ J v

    def apply(self, x: Array) -> Array:
        """Return A x, `(batch, n)`."""
        return x - self.product(x) if self.shifted else self.product(x)

    def begin(self, r: Array, max_steps: int, norm: Array | None = None) -> Krylov:
        """Start the space with the first residual `r` `(batch, n)` and room for `max_steps`; `norm` is ‖r‖ if known."""
        backend, xp = self.backend, self.backend.xp
        norm = backend.to_accum_dtype(backend.norm(r) if norm is None else norm)
        size = max(1, max_steps)
        v = r / backend.cast(xp.where(norm > 0, norm, xp.ones_like(norm)), r)[:, None]
        basis = backend.history(r, size + 1).append(v)
        null_vector = backend.cast(basis.slot(), norm)[None, :] + 0 * norm[:, None]  # (batch, m + 1)
        return Krylov(
            basis=basis,
            columns=backend.history(xp.concat([null_vector, null_vector], axis=1), size),
            v=v,
            source_slot=null_vector,
            null_vector=null_vector,
            null_norm_sq=xp.ones_like(norm),
            start=norm,
            residual=norm,
            can_grow=xp.isfinite(norm),
            steps=xp.zeros_like(norm, dtype=xp.int32),
            dimension=xp.astype(xp.sum(0 * null_vector[:0]), xp.int32),
        )

    def grow(
        self,
        k: Krylov,
        goal: Array,
        steps: int | Array,
        *,
        together: bool = False,
        joining: NextJoining | None = None,
    ) -> Krylov:
        """Add dimensions until each residual is at most `goal` `(batch,)`, `steps` at most.

        With `together` all samples pause as soon as one of them is there. Slots are shared: a sample that paused
        alone while others grew on would find none left when it continues. `joining` is for fused kernels alone.
        """
        xp, kernels = self.backend.xp, self.backend.kernels
        fused = None
        if kernels is not None and self.check_every == "auto" and self.backend.host.numpy_view(k.residual) is not None:
            options = {"twice": self.reorthogonalize, "shifted": self._shifted(), "together": together}
            fused = kernels.grow(k, self._image, goal, int(steps), joining=joining, **options)
        if fused is not None:
            return fused
        asked = k.can_grow & (k.residual > goal)

        def running(k: Krylov) -> Array | bool:
            going, residual, least, first = map(self.backend.host.numpy_view, (k.can_grow, k.residual, goal, asked))
            if going is None or residual is None or least is None or first is None:
                waiting = k.can_grow & (k.residual > goal)
                return xp.any(waiting) & ~xp.any(asked & ~waiting) if together else xp.any(waiting)
            waiting = going & (residual > least)
            return bool(waiting.any()) and not (together and (first & ~waiting).any())

        return self.backend.loop(running, lambda k: self._step(k, goal), k, steps, self.check_every)

    def _shifted(self) -> bool:
        """Return whether steps take the product with J. One projection alone would cancel: see `arnoldi`."""
        return self.shifted and self.precondition is None and self.reorthogonalize

    def _image(self, v: Array) -> Array:
        """Return the product of a step with a basis vector `(batch, n)`."""
        direction = v if self.precondition is None else self.precondition(v)
        return self.product(direction) if self._shifted() else self.apply(direction)

    def _step(self, k: Krylov, goal: Array) -> Krylov:
        backend, xp = self.backend, self.backend.xp
        shifted, w = self._shifted(), self._image(k.v)
        kernels = backend.kernels
        fused = None if kernels is None else kernels.arnoldi(k, w, goal, self.reorthogonalize, shifted)
        if fused is not None:
            return fused
        active = k.can_grow & (k.residual > goal)
        w, h, scale, height = orthogonalize(backend, k.basis, w, self.reorthogonalize)
        if shifted:  # A v = v − J v: the same space, and the next vector turned round
            h, scale = k.source_slot - h, xp.maximum(scale, xp.ones_like(scale))
        floor = 4 * backend.eps(w) * scale
        broke = height <= floor  # the space is invariant: its solution is exact, or A is singular
        height = xp.where(broke, floor, height)
        height = xp.where(height == 0, xp.ones_like(height), height)  # nothing may divide by it, in derivatives neither
        v = w / backend.cast(-height if shifted else height, w)[:, None]

        following = backend.cast(xp.roll(k.basis.slot(), 1), height)[None, :]
        overlap = xp.sum(k.null_vector * h, axis=1)
        # A column without a new direction either completes the solution or, if it adds nothing to the equations that
        # are left (A singular), must not be taken: its residual would be rounding over rounding.
        empty = broke & (xp.abs(overlap) <= 16 * floor * xp.sqrt(k.null_norm_sq))
        entry = -overlap / height
        null_norm_sq = k.null_norm_sq + entry * entry
        residual = k.residual * xp.sqrt(k.null_norm_sq / null_norm_sq)
        taken = active & xp.isfinite(residual) & ~empty
        going = taken & ~broke
        null_vector = k.null_vector + entry[:, None] * following
        return Krylov(
            basis=k.basis.masked(going).append(v),
            columns=k.columns.masked(taken).append(xp.concat([h + height[:, None] * following, k.source_slot], axis=1)),
            v=backend.select(active, v, k.v),
            source_slot=xp.where(active[:, None], following, k.source_slot),
            null_vector=xp.where(taken[:, None], null_vector, k.null_vector),
            null_norm_sq=xp.where(taken, null_norm_sq, k.null_norm_sq),
            start=k.start,
            residual=xp.where(taken, residual, k.residual),
            can_grow=xp.where(active, going, k.can_grow),
            steps=k.steps + xp.astype(active, xp.int32),
            dimension=k.dimension + 1,
        )

    def solution(self, k: Krylov, fit: LeastSquares | None = None) -> Array:
        """Return the x in the space with the least residual, `(batch, n)`."""
        fit = self.least_squares(k, inverse=False) if fit is None else fit
        x = k.basis.masked(None).combine(fit.y)
        return x if self.precondition is None else self.precondition(x)

    def least_squares(self, k: Krylov, *, inverse: Array | bool = True) -> LeastSquares:
        """Solve the small system; where `inverse` is False, `inverse_norm` may be 1."""
        backend, xp = self.backend, self.backend.xp
        fused = None if backend.kernels is None else backend.kernels.least_squares(k, inverse)
        if fused is not None:
            y, size, *figures = fused
            return LeastSquares(k.start[:, None] * y, k.start * size, *figures)
        y, one = self._coefficients(k), xp.ones_like(k.start)  # for β = 1: β² may leave the range
        hessenberg, _ = self.hessenberg(k)
        if hessenberg.shape[2] == 0:
            return LeastSquares(y, 0 * k.start, one, 0 * k.start, one, one)
        column_norm = xp.sqrt(xp.max(xp.sum(hessenberg * hessenberg, axis=1), axis=1))
        inverse_norm = one if inverse is False else self.inverse_norm(k)
        size = k.start * xp.sqrt(xp.sum(y * y, axis=1))
        return LeastSquares(k.start[:, None] * y, size, inverse_norm, column_norm, *self._falls(k))

    def trusted(self, k: Krylov, size: Array, column_norm: Array) -> Array:
        """Return the residual, but no less than the rounding of A x for ‖x‖ = `size`.

        Where A is singular to rounding and b is not in its range, x grows until rounding alone closes the equations
        of the space: the recurrence then fell to 1e-10 while the true residual was above 1.
        """
        return self.backend.xp.maximum(k.residual, self.backend.eps(k.v) * column_norm * size)

    def inverse_norm(self, k: Krylov) -> Array:
        """1/σ_min(H̄) per sample, the norm of (A M)^-1 as far as the space has seen it: a lower bound of it."""
        backend, xp = self.backend, self.backend.xp
        hessenberg, missing = self.hessenberg(k)
        if hessenberg.shape[2] == 0:
            return xp.ones_like(k.start)
        size = xp.sum(xp.sum(hessenberg * hessenberg, axis=2), axis=1)  # fills columns not reached
        fill = backend.cast(missing, hessenberg)[:, None, :] * xp.sqrt(size)[:, None, None]
        # Column j without an entry goes with slot j + 1 without a vector: what is there keeps its singular values.
        eye = xp.roll(backend.linalg.eye(fill, hessenberg.shape[1], hessenberg.shape[2]), 1, axis=0)
        filled = hessenberg + eye[None] * fill
        sound = xp.isfinite(size)[:, None, None]
        least = backend.linalg.least_singular_value(xp.where(sound, filled, eye[None]), k.dimension)
        return xp.where(sound[:, 0, 0], 1.0 / least, xp.full_like(least, float("nan")))

    def _falls(self, k: Krylov) -> tuple[Array, Array]:
        """`latest` and `best` of `LeastSquares`, from the null vector that the space carries anyway."""
        backend, xp = self.backend, self.backend.xp
        _, missing = self.hessenberg(k)
        used = missing.shape[1]
        upper = xp.triu(xp.ones_like(backend.linalg.eye(k.null_vector, used + 1)))
        nu = k.null_vector[:, : used + 1]
        squares = xp.matmul(nu * nu, upper)  # ‖ν‖² after each column
        taken = backend.cast(~missing, k.null_vector)
        last = ~missing & (xp.matmul(taken, upper[:used, :used]) == xp.sum(taken, axis=1)[:, None])
        one = xp.ones_like(taken)
        ratio = xp.where(missing, one, xp.sqrt(squares[:, :-1] / squares[:, 1:]))
        return xp.min(xp.where(last, ratio, one), axis=1), xp.min(xp.where(last, one, ratio), axis=1)

    def hessenberg(self, k: Krylov) -> tuple[Array, Array]:
        """Return H̄ `(batch, used + 1, used)` and which of its columns a sample did not reach `(batch, used)`."""
        xp = self.backend.xp
        columns = k.columns.masked(None).vectors()  # (batch, used, 2 (m + 1))
        used = columns.shape[1]
        matrix = xp.permute_dims(columns[:, :, : used + 1], (0, 2, 1))
        return matrix, xp.sum(xp.abs(matrix), axis=1) == 0

    def _coefficients(self, k: Krylov) -> Array:
        """Return the minimiser y of ‖e₀ − H̄ y‖, in the slots of the basis `(batch, m + 1)`.

        The least residual vector is r̂ = ν ν₀ / ‖ν‖², and rows 1 … k of H̄ are triangular, so H̄ y = e₀ − r̂ is
        solved there. Columns that a sample did not reach get a unit diagonal, and y = 0.
        """
        backend, xp = self.backend, self.backend.xp
        hessenberg, missing = self.hessenberg(k)
        used = hessenberg.shape[2]
        if used == 0:
            return xp.zeros_like(k.null_vector)
        eye = backend.linalg.eye(hessenberg, used)[None]
        triangle = hessenberg[:, 1:, :] + eye * backend.cast(missing, hessenberg)[:, None, :]
        # For β = 1: with a small one these products may vanish, although y does not.
        target = -k.null_vector[:, 1 : used + 1] * (k.null_vector[:, 0] / k.null_norm_sq)[:, None]
        y = backend.linalg.solve_upper(triangle, xp.where(missing, xp.zeros_like(target), target))
        y = xp.where(xp.isfinite(y), y, xp.zeros_like(y))
        source_slot = k.columns.masked(None).vectors()[
            :, :, k.null_vector.shape[1] :
        ]  # column j is A times this vector
        return xp.matmul(y[:, None, :], source_slot)[:, 0, :]

    def residual_vector(self, k: Krylov, rows: Array | None = None) -> Array:
        """B − A x of the solution, `(batch, n)`, from the basis and without a product; zero but in `rows`."""
        start = k.start if rows is None else self.backend.xp.where(rows, k.start, 0 * k.start)
        coefficients = start[:, None] * (k.null_vector * (k.null_vector[:, 0] / k.null_norm_sq)[:, None])
        return k.basis.masked(None).combine(coefficients)
