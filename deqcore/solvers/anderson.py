"""Anderson acceleration (type II) with a relative ridge and a per-sample safeguard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.history import LONGEST, History
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.scaling import divide_rows, multiply_rows, row_scale
from deqcore.abc.solver import Solver
from deqcore.linear.lowrank import AndersonInverse
from deqcore.types import Array, Map


class AndersonState(NamedTuple):
    """The state of Anderson. Small arrays are in the wide dtype.

    Vectors and their products are in units of `unit`, so that they stay in the range of the dtype.

    Attributes:
        values: differences ΔF.
        residuals: differences ΔG.
        system: S ΔGᵀΔG S plus the ridge `(batch, m, m)`; its diagonal is 1 + ridge, also in slots without a vector.
        scale: S, 1/‖Δg_j‖ of each difference, zero in slots without one `(batch, m)`.
        target: ΔGᵀg `(batch, m)`.
        step: next coefficients −γ `(batch, m)`.
        residual: g `(batch, n)`.
        norm: ‖g‖ `(batch,)`, in units of 1.
        unit: power of two near the first ‖g‖ `(batch,)` if that is far from 1, None if no sample needs it.
    """

    values: History
    residuals: History
    system: Array
    scale: Array
    target: Array
    step: Array
    residual: Array
    norm: Array
    unit: Array | None = None


@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration: the combination of recent iterates with the least linearised residual.

    With g = f(z) − z, Δg_j = g_{j+1} − g_j and Δf_j = f(z_{j+1}) − f(z_j) over the last m steps:

        γ = argmin ‖g − ΔG γ‖,   z₊ = f(z) − ΔF γ − (1 − β)(g − ΔG γ)

    The Gram matrix is kept, and only one row of it is new in each step. It is scaled to unit diagonal before a ridge
    is added, so the regularisation is relative to each column: an absolute ridge would turn the method into averaging
    as soon as the residual is small. A sample whose residual grows more than `max_residual_growth`-fold forgets all
    differences but the latest, and continues from there.

    Use it when f contracts; it needs less algebra than Broyden and a short history. Its differences give an
    inverse-Jacobian estimate (multi-secant), H = −I + ΔF (ΔGᵀΔG)^-1 ΔGᵀ.

    Cost: one evaluation of f per step, 2·history_size history vectors.

    Args:
        history_size: differences kept, at least 1. No more are kept than a sample has numbers, because the coefficients
            of further ones are rounding.
        mixing: β in (0, 1].
        ridge: relative ridge, at least 0.
        max_residual_growth: safeguard, above 1.
        history_dtype: dtype of the stored differences, default the state's own.

    Raises:
        ValueError: an option is out of its range. In settings it becomes a ConfigError that names the setting.

    Source: Anderson (1965); Walker & Ni (2011), "Anderson acceleration for fixed-point iterations", eq. (2.2);
    multi-secant form: Fang & Saad (2009).

    Example:
        >>> import numpy as np, deqcore
        >>> sol = deqcore.fixed_point(np.cos, np.ones((1, 1)), forward__solver="anderson", forward__rtol=1e-10)
        >>> round(float(sol.value[0, 0]), 8), int(sol.steps[0]) < 10
        (0.73908513, True)
    """

    history_size: int = 6
    mixing: float = 1.0
    ridge: float = 1e-10
    max_residual_growth: float = 10.0
    history_dtype: str | None = None
    has_estimate: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    cost_bounds: ClassVar[Mapping[str, int]] = {
        "affine": 10,
        "conv": 23,
        "expansive": 13,
        "mlp": 14,
        "monotone": 17,
        "overshoot": 13,
        "ring": 32,
        "slow-modes": 190,
        "tree": 25,
    }

    def __post_init__(self) -> None:
        if self.history_size < 1:
            raise ValueError(f"history_size must be at least 1 (got {self.history_size})")
        if self.history_size > LONGEST:
            raise ValueError(f"history_size must be at most {LONGEST} (got {self.history_size})")
        if not 0.0 < self.mixing <= 1.0:
            raise ValueError(f"mixing must be above 0 and at most 1 (got {self.mixing})")
        if self.ridge < 0.0:
            raise ValueError(f"ridge must be at least 0 (got {self.ridge})")
        if self.max_residual_growth <= 1.0:
            raise ValueError(f"max_residual_growth must be above 1 (got {self.max_residual_growth})")

    def init(self, backend: Backend, z: Array, fz: Array) -> AndersonState:
        """Return a state without differences: the first step is a plain one."""
        g = fz - z
        norm = backend.norm(g)
        state = self.begun(backend, fz, norm, row_scale(backend, norm, g))
        return state._replace(residual=divide_rows(backend, g, state.unit))

    def begun(self, backend: Backend, fz: Array, norm: Array, unit: Array | None) -> AndersonState:
        """Return a state without differences and with an empty residual `(batch, 0)`, in units of `unit`."""
        slots = min(self.history_size, max(1, fz.shape[1]))
        values = backend.history(fz, slots, self.history_dtype)
        residuals = backend.history(fz, slots, self.history_dtype)
        system, none = self._blank(backend, norm, slots)
        return AndersonState(values, residuals, system, none, none, none, fz[:, :0], norm, unit)

    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: AndersonState) -> tuple[Array, Array, Any]:
        """Take one accelerated step, then add the new difference."""
        z = self.point(backend, fz, state)
        if self.mixing != 1.0:
            left = state.residuals.add_combination(state.residual, state.step)
            z = z - (1.0 - self.mixing) * multiply_rows(backend, left, state.unit)
        value = f(z)
        residual = value - z
        return z, value, self.learned(backend, fz, value, residual, backend.norm(residual), state)

    def point(self, backend: Backend, fz: Array, state: AndersonState) -> Array:
        """Return f(z) − ΔF γ, the point of the next evaluation for a mixing of 1."""
        return state.values.add_combination(fz, multiply_rows(backend, state.step, state.unit))

    def learned(
        self, backend: Backend, fz: Array, value: Array, residual: Array, norm: Array, state: AndersonState
    ) -> AndersonState:
        """Return the state with the difference between f(z) and `value`, where the residual has the norm `norm`."""
        before = state.norm
        after, length = self.appended(backend, fz, value, residual, norm, state)
        return self.weighed(backend, before, length, after)

    def appended(
        self, backend: Backend, fz: Array, value: Array, residual: Array, norm: Array, state: AndersonState
    ) -> tuple[AndersonState, Array]:
        """Return the state with the new difference in both histories, and the length of its residual `(batch,)`.

        The small arrays stay those of the differences before, which `weighed` changes.
        """
        unit = state.unit
        sane = norm <= self.max_residual_growth * state.norm
        if not backend.known_all(sane):
            state = self.forget(backend, ~sane, state)
        residual = divide_rows(backend, residual, unit)
        if unit is None:
            values = state.values.append_difference(value, fz)
        else:
            values = state.values.append(divide_rows(backend, value - fz, unit))
        difference = residual - state.residual
        length = backend.to_accum_dtype(backend.norm(difference))
        residuals = state.residuals.append(difference)
        return state._replace(values=values, residuals=residuals, residual=residual, norm=norm), length

    def weighed(self, backend: Backend, before: Array, length: Array, state: AndersonState) -> AndersonState:
        """Return the state with the system of all differences, of which the newest is `length` long.

        Args:
            backend: the backend of these arrays.
            before: norm of the residual before the step `(batch,)`.
            length: of the newest difference of residuals `(batch,)`.
            state: with the histories, the residual and its norm after the step.
        """
        xp, newest = backend.xp, state.residuals.slot()
        # One pass: ΔGᵀΔg = ΔGᵀg₊ − ΔGᵀg, in which ΔGᵀg is known except for the new column's entry.
        target = state.residuals.dot(state.residual)
        inverse = backend.linalg.invert(length, 0 * length)[:, None]
        scale = xp.where(newest[None, :], inverse, state.scale)
        row = (target - state.target) * scale * inverse
        row = xp.where(newest[None, :], xp.full_like(row, 1.0 + self.relative_ridge(backend.eps(row))), row)
        system = xp.where(newest[None, :, None], row[:, None, :], state.system)
        system = xp.where(newest[None, None, :], row[:, :, None], system)
        step = backend.linalg.solve_positive(system, target * scale) * -scale
        usable = xp.isfinite(step)
        if not backend.known_all(usable):
            step = xp.where(usable, step, xp.zeros_like(step))
        return self.unlearned(backend, before, state._replace(system=system, scale=scale, target=target, step=step))

    def returned(
        self, backend: Backend, rows: Array, usable: Array, before: Array, state: AndersonState
    ) -> AndersonState:
        """Return the state for the samples `rows` that go back to the iterate before the step, with the new difference.

        Args:
            backend: the backend of these arrays.
            rows: `(batch,)` of bool.
            usable: rows whose new difference is kept `(batch,)` of bool; the others forget all differences.
            before: `target` before the step.
            state: after the step.
        """
        xp, newest = backend.xp, state.residuals.slot()[None, :]
        # ΔGᵀg for the residual before the step: that of the newest column is Δgᵀg₊ − ‖Δg‖².
        inverse = xp.where(newest, state.scale, xp.zeros_like(state.scale))
        square = xp.where(inverse > 0.0, 1.0 / xp.where(inverse > 0.0, inverse, xp.ones_like(inverse)), inverse) ** 2
        target = xp.where(newest, state.target - square, before)
        step = backend.linalg.solve_positive(state.system, target * state.scale) * -state.scale
        step = xp.where(xp.isfinite(step) & usable[:, None], step, xp.zeros_like(step))
        lost = rows & ~usable
        state = self.forget(backend, lost, state._replace(target=xp.where(rows[:, None], target, state.target)))
        return state._replace(step=xp.where(rows[:, None], step, state.step))

    def unlearned(self, backend: Backend, before: Array, state: AndersonState) -> AndersonState:
        """Return the state after a step; a step from a residual of 0 gives no difference."""
        informative = before != 0.0
        if backend.known_all(informative):
            return state
        step = backend.xp.where(informative[:, None], state.step, backend.xp.zeros_like(state.step))
        return self.forget(backend, ~informative, state)._replace(step=step)

    def restarted(self, backend: Backend, rows: Array, z: Array, state: AndersonState) -> AndersonState:
        """Return the state with no differences and a residual of 0 in `rows`."""
        xp = backend.xp
        blank = state._replace(values=state.values.erase(rows), residuals=state.residuals.erase(rows))
        return self.forget(backend, rows, blank)._replace(
            step=xp.where(rows[:, None], xp.zeros_like(state.step), state.step),
            residual=backend.select(rows, xp.zeros_like(state.residual), state.residual),
            norm=xp.where(rows, xp.zeros_like(state.norm), state.norm),
        )

    def forget(self, backend: Backend, rows: Array, state: AndersonState) -> AndersonState:
        """Return the state without the differences of the samples `rows` `(batch,)`, whose residual grew."""
        xp = backend.xp
        none = xp.zeros_like(state.scale)
        return state._replace(
            values=state.values.restart(rows),
            residuals=state.residuals.restart(rows),
            system=xp.where(rows[:, None, None], self._empty(backend, none, none.shape[1]), state.system),
            scale=xp.where(rows[:, None], none, state.scale),
            target=xp.where(rows[:, None], none, state.target),
        )

    def relative_ridge(self, eps: float) -> float:
        """Return the number to add to the unit diagonal: `ridge`, but more than the rounding of the system's dtype."""
        return max(self.ridge, 10 * eps)

    def _blank(self, backend: Backend, norm: Array, slots: int) -> tuple[Array, Array]:
        """Return the systems `(batch, slots, slots)` and coefficients `(batch, slots)` without differences."""
        wide = backend.to_accum_dtype(norm)
        view = backend.host.numpy_view(wide)
        if view is not None:  # NumPy allocates in a fraction of the time
            blank = np.zeros((len(view), slots * slots), view.dtype)
            blank[:, :: slots + 1] = 1.0 + self.relative_ridge(backend.eps(wide))
            parts = blank.reshape(-1, slots, slots), np.zeros((len(view), slots), view.dtype)
            return backend.host.from_numpy_view(parts[0]), backend.host.from_numpy_view(parts[1])
        zero = backend.xp.zeros_like(wide)[:, None]
        system = zero[:, :, None] + self._empty(backend, zero, slots)
        return system, zero * system[:1, 0]

    def _empty(self, backend: Backend, like: Array, slots: int) -> Array:
        """Return the system of a sample without differences: its γ is 0."""
        return (1.0 + self.relative_ridge(backend.eps(like))) * backend.linalg.eye(like, slots)[None]

    def residual_norm(self, backend: Backend, state: AndersonState) -> Array:
        """Return the norm that the safeguard has measured."""
        return state.norm

    def inverse_jacobian(self, backend: Backend, state: AndersonState) -> InverseJacobian:
        """Return the multi-secant estimate from the current differences."""
        xp = backend.xp
        system, scale = state.system, state.scale
        columns = [
            backend.linalg.solve_positive(system, xp.zeros_like(scale) + unit) for unit in self._units(backend, scale)
        ]
        kernel = xp.stack(columns, axis=2) * scale[:, :, None] * scale[:, None, :]
        kernel = xp.where(xp.isfinite(kernel), kernel, xp.zeros_like(kernel))
        return AndersonInverse(backend, state.values, state.residuals, kernel)

    def _units(self, backend: Backend, like: Array) -> list[Array]:
        eye = backend.linalg.eye(like, like.shape[1])
        return [eye[i][None, :] for i in range(like.shape[1])]
