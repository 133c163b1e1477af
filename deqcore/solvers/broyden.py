"""Broyden's good method in one buffer of residuals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.history import LONGEST, History
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.scaling import divide_rows, multiply_rows, row_scale
from deqcore.abc.solver import Solver
from deqcore.linear.lowrank import BroydenInverse, MultisecantInverse, multisecant
from deqcore.types import Array, Map


class BroydenState(NamedTuple):
    """The basis of residuals and, in the same slots, coefficients with respect to it (all in the wide dtype).

    Attributes:
        basis: residuals Q in units of `unit`, so that their products stay in the range of the dtype.
        gram: row k holds q_kᵀ[q_0 … ½ q_k], so that N = QᵀQ = L + Lᵀ.
        left: columns β u of the updates, K = Σ_j (βu)_j v_jᵀ.
        right: columns v of the updates.
        pairs: in the slot of the residual that it ended in, each secant pair: coefficients of s, then those of y.
        newest: the current residual: one-hot `(batch, m)`, or g₊ − y if a step was refused when the history was full.
        step: coefficients of the next full step −H g `(batch, m)`.
        norm: ‖g‖ of the current residual `(batch,)`.
        guard: with `max_residual_growth`, the part τ of the full step to take next, and the least ‖g‖ so far,
            `(batch,)` each.
        unit: power of two near the first ‖g‖ `(batch,)` if that is far from 1, None if no sample needs it.
    """

    basis: History
    gram: History
    left: History
    right: History
    pairs: History
    newest: Array
    step: Array
    norm: Array
    guard: tuple[Array, Array] | None = None
    unit: Array | None = None


class _Verdict(NamedTuple):
    """Whether a step is taken and whether its pair is usable, `(batch,)` of bool, with the new norm and guard."""

    taken: Array
    usable: Array
    norm: Array
    guard: tuple[Array, Array]


_HISTORIES: Final = ("basis", "gram", "left", "right", "pairs")
HUGE: Final = 1e6  # a refused residual this much larger has no information on the slope, and its square may overflow


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method with H₀ = −I and full steps, s = −H g, g = f(z) − z.

    Every step lies in the span of the residuals seen so far, so one buffer of residuals Q = [g₀ … g_k] and small
    matrices carry the method. With H = −I − Q K Qᵀ, step s = Q c and new residual g₊ (appended to Q as column e):

        d = Qᵀg₊,  u = e + K d  (so −H g₊ = Q u),  w = N c = Qᵀs,  v = c + Kᵀ w  (so −Hᵀs = Q v)
        K₊ = K + u vᵀ / (wᵀc − wᵀu),    c₊ = u · wᵀc / (wᵀc − wᵀu)

    which is H₊ = H + (s − H y) sᵀH / (sᵀH y), because H y = H g₊ + s for a full step. A step takes two passes over the
    buffer (`dot`, `combine`) and no linear solve; after k steps there are k + 1 vectors. K and N are also kept as lists
    of vectors, so that the small algebra costs O(k) and not O(m) vectors. When the history is full, the sample restarts
    from its latest pair: overwriting old pairs is unsound, because later pairs were built on them.

    With `max_residual_growth` a step is refused if it makes the residual larger than `max_residual_growth` times the
    least one so far, or not finite. The sample then stays at its iterate and tries half the step, τ = ½; each accepted
    step doubles τ, up to the full step. The secant pair of the refused step is kept. With s = −τ H g the pair is

        s − H y = s − H g₊ + H g = Q (u + (τ − 1) c),    sᵀH y = wᵀc − wᵀu,    c the coefficients of the full step

    Use it when f is expensive or not a contraction; it leaves an inverse-Jacobian estimate for reuse. Set
    `max_residual_growth` (2, for example) if solves end as DIVERGED or NONFINITE: far from a solution, with f growing
    faster than linearly.

    Cost: one evaluation of f per step, also for a refused one; at most `history_size + 1` history vectors.

    Args:
        history_size: secant pairs kept, at least 1; with `max_residual_growth` at least 3. The default holds the pairs
            of 40 steps, because a restart forgets pairs that reuse would need.
        max_residual_growth: safeguard, at least 1; None takes every step.
        history_dtype: dtype of the stored residuals (``"bfloat16"`` halves the memory), default the state's own.

    Raises:
        ValueError: an option is out of its range. In settings it becomes a ConfigError that names the setting.

    Source: Broyden (1965), "A class of methods for solving nonlinear simultaneous equations"; compact form after
    Byrd, Nocedal & Schnabel (1994); derivation in docs/notes.

    Example:
        >>> import numpy as np, deqcore
        >>> sol = deqcore.fixed_point(lambda z: 3 * np.cos(z), np.ones((1, 1)), forward__rtol=1e-10)
        >>> round(float(sol.value[0, 0]), 6), bool(sol.converged[0])
        (1.170121, True)
    """

    history_size: int = 39  # 40 slots: rows of whole cache lines, whose products have the same bits in any batch
    max_residual_growth: float | None = None
    history_dtype: str | None = None
    has_estimate: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    cost_bounds: ClassVar[Mapping[str, int]] = {
        "affine": 14,
        "conv": 22,
        "expansive": 18,
        "mlp": 17,
        "monotone": 20,
        "overshoot": 15,
        "ring": 23,
        "slow-modes": 44,
        "tree": 22,
    }

    def __post_init__(self) -> None:
        if self.history_size < 1:
            raise ValueError(f"history_size must be at least 1 (got {self.history_size})")
        if self.history_size > LONGEST:
            raise ValueError(f"history_size must be at most {LONGEST} (got {self.history_size})")
        if self.max_residual_growth is not None and not 1.0 <= self.max_residual_growth < float("inf"):
            raise ValueError(
                f"max_residual_growth must be None or a finite number of at least 1 (got {self.max_residual_growth})"
            )
        if self.max_residual_growth is not None and self.history_size < 3:
            raise ValueError(
                f"history_size must be at least 3 with max_residual_growth = {self.max_residual_growth}, because a "
                f"refused step needs the residual before it, too (got {self.history_size})"
            )

    def init(self, backend: Backend, z: Array, fz: Array) -> BroydenState:
        """Return the state with H = −I: the first step is the residual itself."""
        xp = backend.xp
        slots = self.history_size + 1
        g = fz - z
        norm = backend.norm(g)
        unit = row_scale(backend, norm, g)
        g = divide_rows(backend, g, unit)
        basis = backend.history(g, slots, self.history_dtype).append(g)
        d = basis.dot(g)
        none = xp.zeros_like(d)
        newest = none + backend.cast(basis.slot(), d)[None, :]
        return BroydenState(
            basis,
            backend.history(d, slots).append(d * (1.0 - 0.5 * newest)),
            backend.history(d, slots).append(none),
            backend.history(d, slots).append(none),
            backend.history(xp.concat([d, d], axis=1), slots).append(xp.concat([none, none], axis=1)),
            newest,
            newest,
            norm,
            None if self.max_residual_growth is None else (xp.ones_like(backend.to_accum_dtype(norm)), norm),
            unit,
        )

    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: BroydenState) -> tuple[Array, Array, Any]:
        """Take one step and one rank-one update."""
        xp = backend.xp
        start, whole, before = z, state.step, state.newest  # −H g and g by their coefficients in the basis
        c = whole if state.guard is None else state.guard[0][:, None] * whole
        z = state.basis.add_combination(z, multiply_rows(backend, c, state.unit))
        value = f(z)
        g = value - z
        norm, g = backend.norm(g), divide_rows(backend, g, state.unit)
        verdict = self._status_arrays(backend, state, norm)
        if verdict is not None:
            g = backend.select(verdict.usable, g, xp.zeros_like(g))
        renewed = None
        histories: tuple[History, ...] = state[:5]
        e_y = before
        if state.basis.may_be_full():
            s = divide_rows(backend, z - start, state.unit)
            histories, renewed, e_s, e_y = self._renew(backend, state, s, g)
            c = xp.where(renewed, e_s, c)
        basis, gram, left, right, pairs = histories
        basis = basis.append(g)
        unit = backend.cast(basis.slot(), c)[None, :]
        newest = xp.broadcast_to(unit, c.shape)
        d = basis.dot(g)  # (batch, m)
        gram = gram.append(d * (1.0 - 0.5 * unit))
        w = gram.add_combination(gram.dot(c), c)  # N c
        ahead = left.add_combination(newest, right.dot(d))  # −H g₊: the step without the new pair
        v = right.add_combination(c, left.dot(w))  # −Hᵀ s
        ss, sh = backend.inner(w, c), backend.inner(w, ahead)
        y, missed = newest - e_y, ahead  # missed: s − H y, which is −H g₊ after a full step
        along = ss  # −sᵀH g
        if renewed is not None:  # H is −I, and y is in the basis itself
            y = xp.where(renewed, e_y, y)
            before = xp.where(renewed, newest - e_y, before)
            whole = xp.where(renewed, before, whole)
        if renewed is not None or verdict is not None:
            # If c is the whole step, the bracket is exactly zero, so the restart of another sample changes no bit.
            missed, along = ahead + (c - whole), backend.inner(w, whole)
        scaled = backend.linalg.invert(along - sh, backend.eps(ss) * ss)[:, None] * missed
        step = ahead + sh[:, None] * scaled
        guard = None
        if verdict is not None:
            taken, usable = verdict.taken[:, None], verdict.usable[:, None]
            c, y, scaled = (xp.where(usable, part, xp.zeros_like(part)) for part in (c, y, scaled))
            step = xp.where(taken, step, whole + along[:, None] * scaled)
            newest = xp.where(taken, newest, before)
            z, value = backend.select(verdict.taken, z, start), backend.select(verdict.taken, value, fz)
            norm, guard = verdict.norm, verdict.guard
        pairs = pairs.append(xp.concat([c, y], axis=1))
        left, right = left.append(scaled), right.append(v)
        state = BroydenState(basis, gram, left, right, pairs, newest, step, norm, guard, state.unit)
        return z, value, state

    def _status_arrays(self, backend: Backend, state: BroydenState, norm: Array) -> _Verdict | None:
        """Return which samples take the step, and the guard of the next one."""
        if self.max_residual_growth is None:
            return None
        assert state.guard is not None
        xp = backend.xp
        length, best = state.guard
        taken = norm <= self.max_residual_growth * best  # False for NaN, too
        length = xp.where(taken, xp.clip(2.0 * length, max=1.0), 0.5 * length)
        return _Verdict(
            taken=taken,
            usable=norm <= HUGE * best,
            norm=xp.where(taken, norm, state.norm),
            guard=(length, xp.where(norm < best, norm, best)),
        )

    def restarted(self, backend: Backend, rows: Array, z: Array, state: BroydenState) -> BroydenState:
        """Return the state with no residuals and no step in `rows`, so that their next residual is the first one."""
        xp = backend.xp
        blank = state._replace(**{name: getattr(state, name).erase(rows) for name in _HISTORIES})
        none = xp.where(rows[:, None], xp.zeros_like(state.step), state.step)
        guard = state.guard
        if guard is not None:
            whole, best = xp.ones_like(guard[0]), xp.full_like(guard[1], float("inf"))
            guard = xp.where(rows, whole, guard[0]), xp.where(rows, best, guard[1])
        return blank._replace(
            newest=xp.where(rows[:, None], xp.zeros_like(state.newest), state.newest),
            step=none,
            norm=xp.where(rows, xp.zeros_like(state.norm), state.norm),
            guard=guard,
        )

    def started(self, backend: Backend, z: Array, state: BroydenState) -> Array:
        """Return the samples whose residual has the unit that `init` would choose."""
        one = backend.xp.ones_like(state.norm)
        unit = row_scale(backend, state.norm, z)
        return (one if unit is None else unit) == (one if state.unit is None else state.unit)

    def residual_norm(self, backend: Backend, state: BroydenState) -> Array:
        """Return the norm of the residual that the step has formed."""
        return state.norm

    def _renew(
        self, backend: Backend, state: BroydenState, s: Array, g: Array
    ) -> tuple[tuple[History, ...], Array, Array, Array]:
        """Restart the samples that are full, with their latest pair as the first one.

        A restart without the latest pair fails on one in ten hard linear problems with ten pairs; with the pair, on
        none of 200 (docs/notes). Its s and y are not combinations of residuals that stay, so they enter the basis
        themselves. A sample that is not full may see the slot that the new residual would have after them; then they
        take the two slots before the next one. A sample without a residual (see `restarted`) has no pair.

        Returns:
            The histories, which samples have a pair `(batch, 1)` of bool, and the coefficients of s and y.
        """
        xp, active, full = backend.xp, state.basis.active, state.basis.full()
        if self.history_size < 3:  # no room for s, y and the new residual
            restarted = tuple(h.restart(full) for h in state[:5])
            return restarted, full[:, None], 0 * state.step, 0 * state.step
        rows = full if active is None else full & active
        paired = xp.any(state.newest != 0.0, axis=1)
        ready = backend.host.numpy_view(paired if active is None else paired | ~active)
        # Known on the host, without a wait. On a device, samples without a pair then stay in step, with s = 0.
        together = state.basis.all_full() and (ready is None or bool(ready.all()))
        y = g - state.basis.combine(state.newest)
        begun = rows if together else rows & paired

        def renew(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            crowded = ~rows & state.basis.rewind(-2).full()
            crowded = crowded if active is None else crowded & active
            back = 0 if together else 2 * xp.astype(xp.any(crowded), xp.int32)
            basis, gram, left, right, pairs = (
                h.restart_active() if together else h.masked(rows).restart(rows).rewind(back).masked(begun)
                for h in carry[0]
            )
            none, units = xp.zeros_like(carry[1]), []
            for vector in (s, y):
                basis = basis.append(vector)
                unit = none + backend.cast(basis.slot(), none)[None, :]
                gram = gram.append(basis.dot(vector) * (1.0 - 0.5 * unit))
                left, right = left.append(none), right.append(none)
                pairs = pairs.append(xp.concat([none, none], axis=1))
                units.append(unit)
            histories = tuple(h.masked(active) for h in (basis, gram, left, right, pairs))
            return histories, units[0], xp.where(begun[:, None], units[1], carry[2])

        start = tuple(state[:5]), 0 * state.step, state.newest
        histories, e_s, e_y = renew(start) if together else backend.cond(rows, renew, start)
        return tuple(h.masked(active) for h in histories), begun[:, None], e_s, e_y

    def inverse_jacobian(self, backend: Backend, state: BroydenState) -> InverseJacobian:
        """Return H after the last secant pair."""
        return BroydenInverse(state.basis, state.left, state.right, backend.kernels)

    def secant_estimate(self, backend: Backend, state: BroydenState) -> InverseJacobian:
        """Return the type-I multi-secant estimate of all pairs in the history."""

        def whole() -> MultisecantInverse:
            return self._secants(backend, state)

        kernels = backend.kernels
        fused = None if kernels is None else kernels.secants(state.basis, state.gram, state.pairs, whole)
        return whole() if fused is None else fused

    def _secants(self, backend: Backend, state: BroydenState) -> MultisecantInverse:
        xp = backend.xp
        both = state.pairs.vectors()  # (batch, used, 2 m)
        used, slots = both.shape[1], state.step.shape[1]
        steps, differences = both[:, :, :used], both[:, :, slots : slots + used]
        lower = state.gram.vectors()[:, :, :used]
        gram = lower + xp.permute_dims(lower, (0, 2, 1))
        return multisecant(backend, state.basis, gram, steps, differences)
