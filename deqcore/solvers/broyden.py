"""Broyden's good method in one buffer of residuals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from deqcore.backend import Array, Backend, History, Map
from deqcore.linear.lowrank import InverseJacobian, OneBasis, matvec, multisecant, vecmat
from deqcore.solver import Solver


class BroydenState(NamedTuple):
    """Basis Q of residuals, kernel K and Gram matrix N = QᵀQ `(batch, m, m)`, coefficients of the next step `(batch, m)`.

    `taken` holds the coefficients of the steps that led to each residual of the basis, in the same slots.
    """

    basis: History
    taken: History
    kernel: Array
    gram: Array
    step: Array


@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's good method with H₀ = −I and full steps, s = −H g, g = f(z) − z.

    Every step lies in the span of the residuals seen so far, so one buffer of residuals Q = [g₀ … g_k] and small
    matrices carry the method. With H = −I − Q K Qᵀ, step s = Q c and new residual g₊ (appended to Q as column e):

        d = Qᵀg₊,  h = −(e + K d)  (so H g₊ = Q h),  w = N c = Qᵀs,  v = −(c + Kᵀ w)  (so Hᵀs = Q v)
        K₊ = K + h vᵀ / (wᵀc + wᵀh),    c₊ = −h · wᵀc / (wᵀc + wᵀh)

    which is H₊ = H + (s − H y) sᵀH / (sᵀH y), since for a full step H y = H g₊ + s. Two passes over the buffer a
    step (`dot`, `combine`), no linear solve, k + 1 vectors after k steps. When the memory is full the sample
    restarts: overwriting old pairs is unsound, as later ones were built on them.

    Use it when f is expensive or not a contraction; it leaves an inverse-Jacobian estimate for reuse.

    Cost: one evaluation of f per step; `memory + 1` history vectors at most.

    Args:
        memory: secant pairs kept, at least 1.
        history_dtype: dtype of the stored residuals (``"bfloat16"`` halves the memory), default the state's own.

    Source: Broyden (1965), "A class of methods for solving nonlinear simultaneous equations"; compact form after
    Byrd, Nocedal & Schnabel (1994); derivation in docs/design.md.

    Example:
        >>> import numpy as np, deqcore
        >>> sol = deqcore.fixed_point(lambda z: 3 * np.cos(z), np.ones((1, 1)), forward__rtol=1e-10)
        >>> round(float(sol.value[0, 0]), 6), bool(sol.converged[0])
        (1.170121, True)
    """

    memory: int = 20
    history_dtype: str | None = None
    has_estimate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"memory = {self.memory}, but at least 1 secant pair is expected")

    def init(self, backend: Backend, z: Array, fz: Array) -> BroydenState:
        """H = −I: the first step is the residual itself."""
        g = fz - z
        basis = backend.history(g, self.memory + 1, self.history_dtype).append(g)
        gram = basis.dot(g)[:, :, None] * backend.cast(basis.slot(), basis.dot(g))[None, None, :]
        step = backend.cast(basis.slot(), gram)[None, :] + gram[:, :, 0] * 0
        taken = backend.history(step, self.memory + 1).append(backend.xp.zeros_like(step))
        return BroydenState(basis, taken, backend.xp.zeros_like(gram), gram, step)

    def step(
        self, backend: Backend, f: Map, z: Array, fz: Array, state: BroydenState
    ) -> tuple[Array, Array, Any]:
        """One full step and one rank-one update."""
        xp = backend.xp
        z = z + state.basis.combine(state.step)
        fz = f(z)
        g = fz - z
        full = state.basis.full()
        keep = ~full[:, None]
        kernel = state.kernel
        c = state.step
        basis = state.basis.restart(full).append(g)
        newest = basis.slot()
        e = backend.cast(newest, c)[None, :]
        d = basis.dot(g)  # (batch, m)
        gram = xp.where(newest[None, :, None], d[:, None, :], state.gram)
        gram = xp.where(newest[None, None, :], d[:, :, None], gram)
        w = matvec(backend, gram, c)
        h = -(e + matvec(backend, kernel, d))
        v = -(c + vecmat(backend, w, kernel))
        ss = xp.sum(w * c, axis=1)
        denominator = ss + xp.sum(w * h, axis=1)
        tiny = xp.finfo(denominator.dtype).eps
        sound = (xp.abs(denominator) > tiny * ss)[:, None] & keep
        scale = (1.0 / denominator)[:, None]
        return z, fz, BroydenState(
            basis,
            state.taken.restart(full).append(xp.where(keep, c, xp.zeros_like(c))),
            xp.where(sound[:, :, None], kernel + (scale * h)[:, :, None] * v[:, None, :], xp.zeros_like(kernel)),
            gram,
            xp.where(sound, -h * (ss[:, None] * scale), e + xp.zeros_like(c)),
        )

    def inverse_jacobian(self, backend: Backend, state: BroydenState) -> InverseJacobian:
        """H after the last secant pair."""
        return OneBasis(backend, state.basis, state.kernel)

    def secant_estimate(self, backend: Backend, state: BroydenState) -> InverseJacobian:
        """The type-I multi-secant estimate of all pairs in memory."""
        xp = backend.xp
        steps = state.taken.vectors()  # (batch, used, m)
        used, slots = steps.shape[1], steps.shape[2]
        eye = xp.eye(slots, dtype=steps.dtype, device=steps.device)
        newer = (eye - xp.roll(eye, -1, axis=1))[None, :used, :]  # residual after the step minus the one before
        there = xp.any(steps != 0, axis=2)
        differences = xp.where(there[:, :, None], newer, xp.zeros_like(steps))
        return multisecant(backend, state.basis, state.gram, steps, differences)
