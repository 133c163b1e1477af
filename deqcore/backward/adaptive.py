"""A truncated solve for training loops: as few vjps as the gradient of the batch needs, by audits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, NamedTuple

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.abc.backward import relative, report
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.stateful import StatefulStrategy
from deqcore.backward.controller import Controller, Learned, Signals, nested
from deqcore.backward.exact_ift import SPACE, ExactIFT
from deqcore.linear.gmres import KrylovSpace
from deqcore.linear.norms import default_rtol
from deqcore.linear.powers import powers_gram
from deqcore.types import AdjointReport, Array, Map, PassInputs, Status

SOLVED: Final = 0.02
"""Adjoint residual of an audit, in parts of the error that is asked for."""

ENOUGH: Final = 0.3
"""Adjoint residual of a solve between audits, in parts of the error that is asked for: the batch's gradient had an
error of up to 1.6 times the residual in 95 % of the passes."""


class _Pass(NamedTuple):
    """What a branch of the pass returns. Arrays `(batch,)` but u `(batch, n)`, the state, and scalars."""

    u: Array
    status: Array
    vjps: Array
    residual: Array
    products: Array
    state: Array


@dataclass(frozen=True)
class Adaptive(StatefulStrategy):
    """u = Σ_{j≤k} c_j (Jᵀ)^j g with k and c from audits: the fewest vjps that keep the gradient within its target.

    The gradient that training uses is that of the batch with respect to the parameters, and its relative error is what
    counts. An *audit* solves the adjoint equation to a small part of that error and uses that gradient. From the same
    Krylov space, without a vjp more, it forms powers (Jᵀ)^j g, and their products with the parameters. Their inner
    products with the solved gradient give the error of every polynomial of the powers. The strategy averages them over
    audits, fits the coefficients of each degree by least squares, and takes the least degree k whose error stays below
    `max_relative_error` with a margin. Coefficients are always judged by later audits than those that made them.
    Degree 0 is jacobian-free up to a factor; coefficients of 1 are the Neumann series.

    Where no degree is good enough, each pass solves the adjoint equation, as exact-ift does, to `ENOUGH` of the error.

    It needs state between the passes. A layer of PyTorch keeps it in its checkpoint; in training mode only. Functions
    take `strategy_state`; in JAX the state is an argument, see `deqcore_jax.strategy_state`. Without a state each pass
    is exact.

    Cost: k vjps and two passes over `(batch, n)` for each. An audit costs the vjps of exact-ift to `audit_rtol`, k + 4
    products with the parameters (a backward pass of f without that to z), `max_vjps` + 3 while passes are exact, and as
    many gradients in memory, of at most `ENTRIES` numbers for each parameter array.

    Args:
        max_relative_error: largest relative error of the batch's parameter gradient, in (0, 1). About one step in
            twenty may exceed it.
        audit_every: most backward passes from one audit to the next. Audits come sooner at the start, after one that
            found too large an error, and after a jump of what a pass measures anyway: the growth of (Jᵀ)^k g, the
            share of unconverged forward solves, their residual.
        max_vjps: largest k.
        fallback: where no k is good enough, "exact-ift" solves the equation; "none" takes `max_vjps` and reports
            MAX_STEPS.
        audit_rtol: relative adjoint residual of all solves; "auto" is `SOLVED` · `max_relative_error` in audits and
            `ENOUGH` of it between them, or that of exact-ift by dtype where it is larger. Without a state "auto" is
            that of exact-ift.

    Raises:
        ValueError: an option is out of its range. From settings it is the ConfigError that names the setting.

    Source: docs/notes/adaptive.md.

    Example:
        >>> import numpy as np, deqcore
        >>> state, g = deqcore.StrategyState(), np.ones((1, 1))
        >>> for step in range(4):
        ...     z, (dx,) = deqcore.vjp(lambda z, x: 0.5 * z + x, np.zeros((1, 1)), g, cotangent=g,
        ...                            backward__strategy="adaptive", strategy_state=state)
        >>> dx.round(3).tolist()  # without a vjp: one factor is all that is to learn here
        [[2.0]]
    """

    max_relative_error: float = 0.5
    audit_every: int = 50
    max_vjps: int = 8
    fallback: Literal["exact-ift", "none"] = "exact-ift"
    audit_rtol: float | Literal["auto"] = "auto"
    needs: ClassVar[Literal["nothing", "vjp", "estimate"]] = "vjp"
    cost_bounds: ClassVar[Mapping[str, int]] = {}

    def __post_init__(self) -> None:
        if not 0.0 < self.max_relative_error < 1.0:
            raise ValueError(f"max_relative_error must be a number between 0 and 1 (got {self.max_relative_error}).")
        if self.audit_every < 1:
            raise ValueError(f"audit_every must be at least 1 (got {self.audit_every}).")
        if not 0 <= self.max_vjps < SPACE:
            raise ValueError(f"max_vjps must be from 0 to {SPACE - 1} (got {self.max_vjps}).")
        if self.fallback not in ("exact-ift", "none"):
            raise ValueError(f"fallback must be 'exact-ift' or 'none' (got {self.fallback!r}).")
        if self.audit_rtol != "auto" and not 0.0 <= self.audit_rtol < 1.0:
            raise ValueError(f"audit_rtol must be 'auto' or a number from 0 to below 1 (got {self.audit_rtol}).")

    @property
    def controller(self) -> Controller:
        """The rules."""
        return Controller(self.max_relative_error, self.audit_every, self.max_vjps + 1, self.fallback == "exact-ift")

    def tolerance(self, backend: Backend, g: Array, part: float = SOLVED) -> float:
        """Return the relative adjoint residual on cotangents `g` `(batch, n)`; "auto" is this part of the target."""
        if self.audit_rtol == "auto":
            return max(default_rtol(backend, g), part * self.max_relative_error)
        return float(self.audit_rtol)

    def init_state(self) -> list[float]:
        """Return a state that asks for an audit."""
        return self.controller.initial()

    def learned(self, values: Array) -> Learned:
        """Return the state as figures, from an array that NumPy can read."""
        return self.controller.unpack(np, np.asarray(values))

    def solve_adjoint(
        self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian | None
    ) -> tuple[Array, AdjointReport]:
        """Solve exactly: without a state nothing is known of cheaper gradients."""
        return ExactIFT(rtol=self.audit_rtol).solve_adjoint(backend, vjp, g, None)

    def solve_with_state(
        self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian | None, inputs: PassInputs
    ) -> tuple[Array, AdjointReport, Array]:
        """Take the polynomial in force, or solve exactly and learn."""
        rules, (xp, values, now) = self.controller, self._figures(backend, inputs)
        s = rules.unpack(xp, values)
        audit = rules.due(xp, s)
        solves = audit | (s.chosen >= rules.candidates)
        if xp is np and not (inputs.has_vjp and solves):
            return self._summed(backend, vjp, g, s, now, inputs)
        plain = report(backend, g)
        missed = (s.bound > self.max_relative_error) & (s.chosen < rules.candidates)
        status = plain.status * 0 + backend.xp.where(
            _flag(backend, missed, plain.status), int(Status.MAX_STEPS), int(Status.CONVERGED)
        )
        status = backend.xp.astype(status, backend.xp.int32)
        begin = _Pass(g, status, plain.vjps, plain.residual, plain.vjps, values)
        task = _Task(self, backend, rules, vjp, g, inputs, xp, s, now, audit)
        end = backend.cond(_flag(backend, ~solves, g), task.truncated, begin)
        end = backend.cond(_flag(backend, solves, g), task.solved, end)
        return end.u, *task.reported(end, plain)

    def next_uses_vjp(self, values: Array) -> bool:
        """Return whether the next pass is an audit, is exact, or has k > 0."""
        rules, s = self.controller, self.learned(values)
        return bool(rules.due(np, s) | (s.chosen >= rules.candidates) | (rules.steps(np, s) > 0))

    def _summed(
        self, backend: Backend, vjp: Map, g: Array, s: Learned, now: Signals, inputs: PassInputs
    ) -> tuple[Array, AdjointReport, Array]:
        """Sum the powers with the coefficients in force, where decisions are made on the host.

        A pass that may not call `vjp`, whose state asks for it since f was recorded, takes the fit of degree 0, or g if
        the state is new. The audit waits for the next pass.
        """
        rules, c = self.controller, s.coefficients
        k = int(rules.steps(np, s)) if inputs.has_vjp else 0
        unknown = bool((k < s.chosen) | (s.begun == 0))
        if unknown:
            eye = np.eye(rules.candidates, dtype=np.float32)
            c = nested(np, s.gram, s.right, eye)[0] if s.begun > 0 else eye[0]
        w, u = g, float(c[0]) * g
        for j in range(k):
            w = vjp(w)
            u = u + float(c[j + 1] if j < rules.candidates - 1 else 0.0) * w
        growth = np.float32(backend.to_numpy(_growth(backend, g, w, s.growth))) if k and len(g) else s.growth
        after = rules.grown(np, s, growth, now, measured=k > 0)
        after = after._replace(passes=s.passes + 1, vjps=s.vjps + (k if len(g) else 0))
        filled = report(backend, g, vjps=k)
        if unknown or s.bound > self.max_relative_error:
            filled = filled._replace(status=filled.status * 0 + int(Status.MAX_STEPS))
        return u, filled, backend.asarray(rules.pack(np, after), like=inputs.values)

    def _figures(self, backend: Backend, inputs: PassInputs) -> tuple[Any, Array, Signals]:
        """Return where decisions are made (NumPy, unless the code is traced), the state and the free signals there."""
        xp = backend.xp
        values, residual, converged = map(backend.host.numpy_view, (inputs.values, inputs.residual, inputs.converged))
        if values is not None and residual is not None and converged is not None:
            left = residual[np.isfinite(residual)].astype(np.float64)
            lost = np.count_nonzero(~converged) / max(1, len(converged))
            mean = left.sum() / max(1, len(left))
            return np, values.astype(np.float32), Signals(np.float32(mean), np.float32(lost))
        residual = backend.to_accum_dtype(inputs.residual)
        sound = xp.isfinite(residual)
        count = xp.sum(xp.where(sound, xp.ones_like(residual), xp.zeros_like(residual)))
        mean = xp.sum(xp.where(sound, residual, xp.zeros_like(residual))) / xp.maximum(count, xp.ones_like(count))
        lost = xp.sum(xp.where(inputs.converged, xp.zeros_like(residual), xp.ones_like(residual)))
        lost = lost / max(1, residual.shape[0])
        if backend.is_traced(inputs.values, residual):
            kind = inputs.values.dtype
            return xp, inputs.values, Signals(xp.astype(mean, kind), xp.astype(lost, kind))
        figures = backend.to_numpy(xp.stack([mean, lost])).astype(np.float32)
        return np, backend.to_numpy(inputs.values).astype(np.float32), Signals(figures[0], figures[1])


@dataclass(frozen=True)
class _Task:
    """The branches of one pass."""

    strategy: Adaptive
    backend: Backend
    rules: Controller
    vjp: Map
    g: Array
    inputs: PassInputs
    xp: Any  # of the state
    s: Learned
    now: Signals
    audit: Array

    def truncated(self, p: _Pass) -> _Pass:
        """Sum the powers with the coefficients in force, by k vjps."""
        backend, s = self.backend, self.s
        c = backend.cast(backend.asarray(s.coefficients, like=self.g), self.g)
        # The next coefficient is always the first, so that traced code needs no index; a zero follows the last one.
        start = self.g, c[0] * self.g, backend.xp.concat([c[1:], 0 * c[:1]])

        def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            w, u, c = carry
            w = self.vjp(w)
            return w, u + c[0] * w, backend.xp.roll(c, -1)

        k, going = self.xp.astype(self.rules.steps(self.xp, s), self.xp.int32), _flag(backend, ~self.audit, self.g)
        w, u, _ = backend.loop(lambda carry: going, step, start, k)
        after = self.rules.grown(self.xp, s, self._small(_growth(backend, self.g, w, s.growth)), self.now)
        vjps = p.vjps + backend.asarray(k, like=p.vjps)
        return p._replace(u=u, vjps=vjps, state=self.rules.pack(self.xp, after))

    def _small(self, x: Array) -> Array:
        """Return an array where decisions are made."""
        if self.xp is not np:
            return self.xp.astype(x, self.s.passes.dtype)
        return self.backend.to_numpy(x).astype(np.float32)

    def solved(self, p: _Pass) -> _Pass:
        """Solve to tolerance in one Krylov space, and learn from it if this is an audit."""
        backend, xp = self.backend, self.backend.xp
        space = KrylovSpace(backend, self.vjp, shifted=True)
        norm = backend.to_accum_dtype(backend.norm(self.g))
        wanted = _flag(backend, self.audit, norm)
        of = self.strategy.tolerance
        goal = xp.where(wanted, of(backend, self.g) * norm, of(backend, self.g, ENOUGH) * norm)
        m, powers = self.rules.candidates, self.xp.astype(self.rules.powers(self.xp, self.s), self.xp.int32)
        first = space.begin(self.g, SPACE)
        # The powers up to (Jᵀ)^k g need k dimensions; where the solve alone is wanted the goal ends them.
        k = space.grow(first, xp.where(wanted, 0 * goal, goal), powers - 1)
        k = space.grow(k, goal, SPACE - powers + 1)
        u = space.solution(k)
        met = (k.residual <= goal) & xp.isfinite(k.residual)
        current = _Pass(u, xp.where(met, p.status * 0 + int(Status.CONVERGED), p.status), k.steps + 0 * p.vjps,
                      backend.cast(relative(backend, k.residual, norm), p.residual), p.products, p.state)  # fmt: skip
        current = backend.cond(~met & xp.isfinite(norm), lambda q: self._finished(q, met), current)
        current = self._marked(current, norm)
        after = self.rules.pack(self.xp, self.s._replace(since=self.s.since + 1))

        def audited(q: _Pass) -> _Pass:
            sound = self.inputs.converged & (q.status == int(Status.CONVERGED))
            of = self.inputs.parameter_vjp
            gram, products = powers_gram(backend, k, first.null_vector, q.u, sound, m, of, formed=powers)
            state = self._learned(self._small(gram))
            return q._replace(products=q.products + products, state=self.rules.pack(self.xp, state))

        return backend.cond(_flag(backend, self.audit, self.g), audited, current._replace(state=after))

    def _finished(self, p: _Pass, met: Array) -> _Pass:
        """Solve the samples again that one Krylov space does not solve, as exact-ift does."""
        backend, xp = self.backend, self.backend.xp
        wanted = backend.select(met, xp.zeros_like(self.g), self.g)
        rtol = self.strategy.tolerance(backend, self.g)
        u, again = ExactIFT(rtol=rtol).solve_adjoint(backend, self.vjp, wanted, None)
        return p._replace(
            u=backend.select(met, p.u, u), status=xp.where(met, p.status, again.status),
            vjps=xp.where(met, p.vjps, p.vjps + again.vjps), residual=xp.where(met, p.residual, again.residual),
        )  # fmt: skip

    def _marked(self, p: _Pass, norm: Array) -> _Pass:
        """Keep a cotangent that is not finite visible."""
        backend, xp = self.backend, self.backend.xp
        finite = xp.isfinite(norm)
        nan = xp.full_like(p.residual, float("nan"))
        return p._replace(
            u=backend.select(finite, p.u, xp.full_like(p.u, float("nan"))),
            status=xp.where(finite, p.status, p.status * 0 + int(Status.NONFINITE)),
            residual=xp.where(finite, p.residual, nan),
        )

    def _learned(self, gram: Array) -> Learned:
        """Return what the controller makes of the inner products `(m + 1, m + 1)`, those of p* first."""
        xp, m = self.xp, self.rules.candidates
        usable = xp.all(xp.isfinite(gram)) & (gram[0, 0] > 0)
        one = xp.eye(m, dtype=gram.dtype)
        unit = xp.where(usable, gram[0, 0], xp.ones_like(gram[0, 0]))
        safe = xp.where(usable, gram / unit, xp.zeros_like(gram))
        learned = self.rules.learn(xp, self.s, safe[1:, 1:], safe[0, 1:], one, self.now)
        excluded = self.rules.exclude(xp, self.s)
        return Learned._make(xp.where(usable, a, b) for a, b in zip(learned, excluded, strict=True))

    def reported(self, p: _Pass, plain: AdjointReport) -> tuple[AdjointReport, Array]:
        """Return the report, and the state with the pass counted in."""
        backend, xp = self.backend, self.backend.xp
        after = self.rules.unpack(self.xp, p.state)
        most = self._small(xp.max(p.vjps)) if p.vjps.shape[0] else 0
        spent = self._small(xp.max(p.products)) if p.vjps.shape[0] else 0
        after = after._replace(passes=after.passes + 1, vjps=after.vjps + most, products=after.products + spent)
        judged = self.audit & (after.audits > self.s.audits) & (after.error >= 0)
        unknown = self.xp.full_like(after.error, float("nan"))
        error, cosine = (self.xp.where(judged, figure, unknown) for figure in (after.error, after.cosine))
        nothing = backend.xp.zeros_like(plain.residual)
        filled = plain._replace(
            status=p.status, vjps=p.vjps, residual=p.residual, gradient_products=p.products,
            gradient_error=nothing + backend.cast(backend.asarray(error, like=nothing), nothing),
            gradient_cosine=nothing + backend.cast(backend.asarray(cosine, like=nothing), nothing),
        )  # fmt: skip
        state = self.rules.pack(self.xp, after)
        return filled, state if self.xp is not np else backend.asarray(state, like=self.inputs.values)


def _growth(backend: Backend, g: Array, w: Array, known: Array) -> Array:
    """Return ‖w‖ / ‖g‖, the mean over samples where it is a number; without samples, what is known."""
    xp = backend.xp
    if not w.shape[0]:
        return known
    each = relative(backend, backend.norm(w), backend.norm(g))
    sound = xp.isfinite(each) & (each > 0)
    one, none = xp.ones_like(each), xp.zeros_like(each)
    count = xp.maximum(xp.sum(xp.where(sound, one, none)), one[0])
    return xp.sum(xp.where(sound, each, none)) / count


def _flag(backend: Backend, wanted: Array, like: Array) -> Array:
    """Return a decision as an array of the backend, of shape `()`."""
    return backend.asarray(wanted, like=like) > 0
