"""A strategy bound to the solver of one call: what the backward pass runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.backend import Backend
from deqcore.abc.backward import StepStrategy, Strategy
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.scaling import divide_rows, multiply_rows, row_scale
from deqcore.abc.solver import Solver
from deqcore.abc.stateful import StatefulStrategy
from deqcore.abc.strategy_state import StrategyState
from deqcore.errors import PluginError
from deqcore.solve.adjoint_tally import Pass
from deqcore.solve.failures import Watch
from deqcore.solve.traced_failures import TracedWatch
from deqcore.solve.verification import failing, replaced
from deqcore.types import AdjointReport, Array, Map, PassInputs, Reached, SolveResult

if TYPE_CHECKING:
    from deqcore.linear.grouped import Groups


@dataclass(frozen=True)
class Adjoint(AdjointSolver):
    """A strategy bound to the solver whose estimate it may use.

    Attributes:
        backend: whose arrays these are.
        strategy: the strategy.
        solver: whose estimate it may use.
        on_failure: the setting `backward.on_failure`. "zero" and "nan" are applied here, in traced code as well.
        watch: verifies, warns and raises; None: nothing of this.
        turned: whether the equation is x = b + J x, so that the estimate is transposed.
        memory: holds the state of a strategy that has one; None: each pass is the first.
        units: consecutive rows that f couples. Above 1 the strategy sees each sample as one row, so that its
            coefficients, report and verification are those of a sample.
    """

    backend: Backend
    strategy: Strategy
    solver: Solver
    on_failure: str = "ignore"
    watch: Watch | TracedWatch | None = field(default=None, repr=False)
    turned: bool = False
    memory: StrategyState | None = field(default=None, repr=False, compare=False)
    units: int = 1

    def __call__(
        self, vjp: Map, g: Array, state: object, turn: Array | None = None, inputs: PassInputs | None = None
    ) -> tuple[Array, AdjointReport]:
        """See `AdjointSolver`; `state` is the forward solver's, with its estimate inside."""
        if self.units == 1:
            return self._solve_samples(vjp, g, state, turn, inputs)
        groups = self._groups()
        inputs = None if inputs is None else groups.inputs(inputs)
        u, report = self._solve_samples(groups.joined(vjp), groups.join(g), state, turn, inputs)
        return groups.split(u), groups.spread(report)

    def _groups(self) -> Groups:
        """Return the samples, each of which is `units` rows."""
        from deqcore.linear.grouped import Groups

        return Groups(self.backend, self.units)

    def _solve_samples(
        self, vjp: Map, g: Array, state: object, turn: Array | None, inputs: PassInputs | None
    ) -> tuple[Array, AdjointReport]:
        """Do the same for rows that are samples."""
        if inputs is None or self.memory is None or not isinstance(self.strategy, StatefulStrategy):
            result = self._checked(*self._call_strategy(vjp, g, self._estimate(state)))
            return self._verify_and_report(vjp, g, turn, *result)
        values = self._values(self.strategy, self.memory.values, g)
        u, report, self.memory.values = self._advance_samples(vjp, g, state, turn, inputs._replace(values=values))
        return u, report

    def _values(self, strategy: StatefulStrategy, kept: Array | None, like: Array) -> Array:
        """Return the state that was kept, or the initial one if there is none of the right length."""
        begin = np.asarray(strategy.init_state(), dtype=np.float32)
        if kept is None or tuple(kept.shape) != begin.shape:
            return self.backend.asarray(begin, dtype="float32", like=like)
        return self.backend.astype(kept, "float32")

    def advance(
        self, vjp: Map, g: Array, state: object, turn: Array | None, inputs: PassInputs
    ) -> tuple[Array, AdjointReport, Array]:
        """See `AdjointSolver`."""
        if self.units == 1:
            return self._advance_samples(vjp, g, state, turn, inputs)
        groups = self._groups()
        result = self._advance_samples(groups.joined(vjp), groups.join(g), state, turn, groups.inputs(inputs))
        return groups.split(result[0]), groups.spread(result[1]), result[2]

    def _advance_samples(
        self, vjp: Map, g: Array, state: object, turn: Array | None, inputs: PassInputs
    ) -> tuple[Array, AdjointReport, Array]:
        """Do the same for rows that are samples."""
        strategy, estimate = self.strategy, self._estimate(state)
        assert isinstance(strategy, StatefulStrategy)
        unit = row_scale(self.backend, self.backend.norm(g), g)
        result: object = strategy.solve_with_state(
            self.backend, vjp, divide_rows(self.backend, g, unit), estimate, self._in_units(inputs, unit)
        )
        if not isinstance(result, tuple) or len(result) != 3:
            name = f"{type(strategy).__name__}.solve_with_state"
            raise PluginError.returned(name, result, "(u, report, state) with the state of the next pass,")
        u, report = self._checked((result[0], result[1]), g)
        if getattr(result[2], "shape", None) != inputs.values.shape:
            name = f"{type(strategy).__name__}.solve_with_state (state)"
            raise PluginError.returned(
                name, result[2], f"a state of the shape {tuple(inputs.values.shape)} that it got"
            )
        allowed = vjp if inputs.has_vjp else None
        return *self._verify_and_report(allowed, g, turn, multiply_rows(self.backend, u, unit), report), result[2]

    def _in_units(self, inputs: PassInputs, unit: Array | None) -> PassInputs:
        """Return products with the parameters of the true u, where `unit` scales its rows."""
        parameter_vjp = inputs.parameter_vjp
        if parameter_vjp is None or unit is None:
            return inputs
        return inputs._replace(parameter_vjp=lambda u: parameter_vjp(multiply_rows(self.backend, u, unit)))

    def _verify_and_report(
        self, vjp: Map | None, g: Array, turn: Array | None, u: Array, report: AdjointReport
    ) -> tuple[Array, AdjointReport]:
        """Verify, replace and report, as the settings say."""
        job = Pass(self.backend, self.strategy, self.on_failure, vjp if self.uses_vjp else None, g)
        findings = None
        if self.watch is not None:
            report, findings = self.watch.verify(job, u, report, turn)
        if self.on_failure in ("zero", "nan"):
            u = replaced(self.backend, u, failing(self.backend, report, g), self.on_failure)
        if self.watch is not None:
            self.watch.deliver(job, report, findings)
        return u, report

    def _estimate(self, state: object) -> InverseJacobian | None:
        """H from the solver's state, or Hᵀ where J stands for Jᵀ; None if the strategy wants none."""
        if not self.uses_state:
            return None
        secants = self.strategy.wants_secants()
        make = self.solver.secant_estimate if secants else self.solver.inverse_jacobian
        estimate = make(self.backend, state)
        if self.units > 1 and estimate is not None:
            estimate = self._groups().estimate(estimate)
        if not self.turned or estimate is None:
            return estimate
        from deqcore.linear.transposed import transposed

        return transposed(estimate)

    def _call_strategy(self, vjp: Map, g: Array, estimate: InverseJacobian | None) -> tuple[object, Array]:
        """Return the result of `solve_adjoint`, called with `g` in units near its norm, with u in units of 1."""
        backend = self.backend
        if not (self.uses_vjp or self.uses_state):
            return self.strategy.solve_adjoint(backend, vjp, g, estimate), g
        unit = row_scale(backend, backend.norm(g), g)
        result = self.strategy.solve_adjoint(backend, vjp, divide_rows(backend, g, unit), estimate)
        if unit is not None and isinstance(result, tuple) and getattr(result[0], "shape", None) == g.shape:
            result = multiply_rows(backend, result[0], unit), *result[1:]
        return result, g

    def _checked(self, result: object, g: Array) -> tuple[Array, AdjointReport]:
        """Return what `solve_adjoint` returned, or raise `PluginError` if it breaks the contract."""
        name, shape = f"{type(self.strategy).__name__}.solve_adjoint", tuple(g.shape)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], AdjointReport):
            expected = (
                "(u, report) with an AdjointReport, as `return u, deqcore.abc.backward.report(backend, g)` gives,"
            )
            raise PluginError.returned(name, result, expected)
        u, report = result
        if getattr(u, "shape", None) != g.shape:
            raise PluginError.returned(name, u, f"u of the cotangent's shape {shape}")
        for part, leaf in zip(AdjointReport._fields, report, strict=True):
            if leaf is not None and getattr(leaf, "shape", None) != g.shape[:1]:
                raise PluginError.returned(f"{name} (report.{part})", leaf, f"one number per sample, {shape[:1]}")
        return u, report

    @property
    def exact(self) -> bool:
        """Whether the result is a true derivative."""
        return self.strategy.exact

    @property
    def name(self) -> str:
        """The name of the strategy's class."""
        return type(self.strategy).__name__

    @property
    def uses_vjp(self) -> bool:
        """Whether the backward pass may call `vjp`."""
        return self.strategy.uses_vjp()

    def next_uses_vjp(self) -> bool:
        """See `AdjointSolver`; a state on a device that would have to be waited for is not read."""
        strategy, kept = self.strategy, None if self.memory is None else self.memory.values
        if not self.uses_vjp or not isinstance(strategy, StatefulStrategy) or kept is None:
            return self.uses_vjp
        values = self.backend.host.numpy_view(kept)
        return values is None or len(values) != len(strategy.init_state()) or strategy.next_uses_vjp(values)

    @property
    def uses_state(self) -> bool:
        """Whether the solver's state must be kept for the backward pass."""
        return self.strategy.wants_estimate()

    @property
    def remembers(self) -> bool:
        """Whether a pass needs `PassInputs`."""
        return isinstance(self.strategy, StatefulStrategy) and (
            self.memory is not None or not self.backend.capabilities.eager
        )

    @property
    def calls_host(self) -> bool:
        """Whether a call in compiled code may call the host."""
        return self.watch is not None

    def transposed(self) -> Adjoint:
        """See `AdjointSolver`."""
        return replace(self, turned=not self.turned)

    def compiled(self, *, staged: bool, observed: bool = False) -> Adjoint:
        """See `AdjointSolver`."""
        if not isinstance(self.watch, TracedWatch):
            return self
        watch = self.watch.compiled(self.on_failure, staged=staged, observed=observed)
        silent = self.on_failure in ("warn", "raise") and not watch.reports
        used = watch if watch.reports or watch.verifies else None
        return replace(self, on_failure="ignore" if silent else self.on_failure, watch=used)

    def turn(self) -> int:
        """See `AdjointSolver`."""
        watch = self.watch
        return watch.turn() if isinstance(watch, TracedWatch) and watch.verifies else -1


@dataclass(frozen=True)
class Steps:
    """A step strategy bound to its solver: what `Autodiff.differentiate_through` differentiates through."""

    backend: Backend
    strategy: StepStrategy
    solver: Solver

    def __call__(self, f: Map, z0: Array, forward: SolveResult | None, step: Any = 0) -> tuple[Array, Reached | None]:
        """Return the differentiable value `(batch, n)` and, without gradients, what the strategy reports about it."""
        with self.backend.errstate():
            result = self.strategy.value_at(self.backend, f, z0, forward, self.solver, step)
        reached = result if isinstance(result, Reached) else None
        value = result if reached is None else reached.z
        if getattr(value, "shape", None) != z0.shape:
            expected = f"an array of the state's shape {tuple(z0.shape)}"
            raise PluginError.returned(f"{type(self.strategy).__name__}.value", value, expected)
        if reached is None:
            return value, None
        detach = self.backend.detach
        return value, reached._replace(z=detach(value), fz=None if reached.fz is None else detach(reached.fz))


def vjp_in_units(
    backend: Backend, value: Callable[..., tuple[Array, Any]], args: tuple[Any, ...], g: Array
) -> tuple[Array, Any, tuple[Any, ...]]:
    """Return `backend.autodiff.vjp(value, args, g)`, by a cotangent of ordinary size.

    The derivative of s f(z/s) multiplies the cotangent by s before it divides by s. A cotangent of the size of s leaves
    the range there. The scale is a power of two for all rows, because the gradient of an argument may sum over them. It
    is halfway between the largest and the smallest row, which would leave the range in the units of the largest.
    """
    norm = backend.norm(g)
    unit = row_scale(backend, _middle(backend, norm), g) if norm.shape[0] else None
    primal, aux, gradients = backend.autodiff.vjp(value, args, divide_rows(backend, g, unit))
    if unit is not None:
        leaves, structure = backend.flatten(gradients)
        gradients = backend.unflatten(structure, [x if x is None else x * backend.cast(unit[0], x) for x in leaves])
    return primal, aux, gradients


def _middle(backend: Backend, norms: Array) -> Array:
    """Return the geometric mean `(1,)` of the largest and the smallest of those norms that are positive and finite."""
    xp = backend.xp
    sound = (norms > 0) & xp.isfinite(norms)
    most = xp.max(xp.where(sound, norms, xp.zeros_like(norms)), keepdims=True)
    least = xp.min(xp.where(sound, norms, xp.zeros_like(norms) + most), keepdims=True)
    return xp.sqrt(most) * xp.sqrt(least)
