"""One call, resolved: solve, attach the gradient, report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.backward import StepStrategy, Strategy
from deqcore.abc.solver import Solver
from deqcore.abc.strategy_state import StrategyState
from deqcore.config.sections import Backward, Forward
from deqcore.errors import (
    ConfigError,
    InitialIterateError,
)
from deqcore.linear.norms import unmeasured
from deqcore.solution import Solution, SolveState
from deqcore.solve.adjoint import Adjoint, Steps, vjp_in_units
from deqcore.solve.failures import Watch
from deqcore.solve.flatten import FlatFunction, RavelSpec
from deqcore.solve.ledger import Account
from deqcore.solve.loop import BoundSolve
from deqcore.solve.termination import greater, judged
from deqcore.solve.traced_failures import TracedWatch
from deqcore.solve.verification import coupled_rows
from deqcore.types import (
    Array,
    BackwardRecord,
    Limits,
    LoopState,
    Map,
    Reached,
    SolveResult,
    Status,
    StoppingCriteria,
)

if TYPE_CHECKING:
    from deqcore.solve.compaction import RestrictRows


class Plan(NamedTuple):
    """One call, resolved: the layers below read neither settings nor registries."""

    forward: Forward
    backward: Backward
    backend: Backend
    solver: Solver
    strategy: Strategy | StepStrategy
    control: StoppingCriteria
    space: RavelSpec
    is_set: Callable[[str], bool]  # whether a setting of this name was chosen, so that it is not the default
    observed: Callable[..., None] | None = None  # takes (solution, seconds, f, z0, args) of a call that has returned
    memory: StrategyState | None = None
    mask: Array | None = None  # units that take part, in the shape of the units
    step: Any = 0

    def run(
        self, f: FlatFunction, z0: Array, args: tuple[Any, ...], state: SolveState | None
    ) -> tuple[Array, SolveResult, BackwardRecord | None]:
        """Solve, attach the gradient."""
        solve = BoundSolve(self.backend, self.solver, self.control, self._resume(state, z0), self.narrow(f, args))
        if isinstance(self.strategy, StepStrategy):
            value, forward, record = *self._step(self.strategy, f, z0, args, solve), None
        else:
            value, forward, record = self.backend.autodiff.implicit(f, z0, args, solve, self.adjoint(f))
        return self.backend.guards.unshared(value, z0), forward, record

    def adjoint(self, f: FlatFunction) -> Adjoint:
        """Return the strategy bound to this call, which verifies its reports and says what failed."""
        assert isinstance(self.strategy, Strategy)
        watch = self.watch(f) if self.backend.capabilities.eager else self._traced_watch(f)
        on_failure = self.backward.on_failure
        units = self.control.units
        return Adjoint(self.backend, self.strategy, self.solver, on_failure, watch, memory=self.memory, units=units)

    def account(self, f: FlatFunction) -> Account:
        """Return where the passes and failures of f are counted."""
        return Account(f.f, self.strategy, (f.space.shapes, f.space.dtype, self.forward.batch))

    def watch(self, f: FlatFunction) -> Watch:
        """Return what verifies and reports the backward passes of f in an eager backend."""
        return Watch(self.account(f), self.backward.verify_every, self.backward.strategy)

    def _traced_watch(self, f: FlatFunction) -> TracedWatch:
        return TracedWatch(
            self.account(f),
            self.backward.verify_every,
            self.backward.strategy,
            asked_to_report=self.is_set("backward.on_failure"),
            asked_to_verify=self.is_set("backward.verify_every"),
        )

    def _step(
        self, strategy: StepStrategy, f: FlatFunction, z0: Array, args: tuple[Any, ...], solve: BoundSolve
    ) -> tuple[Array, SolveResult]:
        """Return the value with the derivative of the strategy's steps, and its result."""
        steps = Steps(self.backend, strategy, self.solver)
        if not strategy.solves():
            value, reached = self.backend.autodiff.differentiate_through(f, z0, args, steps, None, self.step)
            if self.backend.capabilities.autodiff and self.backend.autodiff.grad_enabled():
                self.verify_steps(f, args, value, value)
            if self.mask is not None:  # a strategy may add noise to every unit
                units = self.backend.xp.reshape(self.mask, (-1,))
                value = self.backend.select(units, value, self.backend.detach(z0))
            return value, self.unsolved(value, reached)
        forward = self.backend.autodiff.forward_only(f, z0, args, solve)
        if not self.backend.autodiff.grad_enabled():
            return forward.z, forward
        carrier, _ = self.backend.autodiff.differentiate_through(f, z0, args, steps, forward, self.step)
        if self.backend.capabilities.autodiff:
            self.verify_steps(f, args, forward.z, carrier)
        return self.backend.autodiff.straight_through(forward.z, carrier), forward

    def solution(self, value: Array, forward: SolveResult, record: BackwardRecord | None) -> Solution:
        """Return the solution for the user, with figures in the shape of the units."""
        xp, shape = self.backend.xp, self.space.rows_shape

        def shaped(figures: Array) -> Array:
            return xp.reshape(figures, shape) if len(shape) > 1 else figures

        state = SolveState(forward.carry, repr(self.solver)) if forward.carry is not None else None
        return Solution(
            value=self.space.unravel(value),
            residual=shaped(forward.residual),
            status=shaped(forward.status),
            steps=shaped(self.counted(forward.steps, 0)),
            evaluations=shaped(self.counted(forward.evaluations, 0)),
            state=state,
            backend=self.backend,
            record=record,
            z=self.space.unravel(forward.z),
            fz=None if forward.fz is None else self.space.unravel(forward.fz),
            mask=self.mask,
        )

    def counted(self, figures: Array, other: int) -> Array:
        """Return `figures` `(batch,)`, with `other` for units that the mask leaves out."""
        xp = self.backend.xp
        if self.mask is None:
            return figures
        return xp.where(xp.reshape(self.mask, figures.shape), figures, xp.full_like(figures, other))

    def differentiate(
        self, f: FlatFunction, z0: Array, args: tuple[Any, ...], g: Array
    ) -> tuple[Array, tuple[Any, ...], SolveResult, BackwardRecord | None]:
        """Return z* and gradients for `args` by the framework's own differentiation of the attached value."""

        def value(*moved: Any) -> tuple[Array, tuple[SolveResult, BackwardRecord | None]]:
            primal, forward, record = self.run(f, z0, moved, None)
            return primal, (forward, record)

        primal, (forward, record), gradients = vjp_in_units(self.backend, value, args, g)
        return primal, gradients, forward, record

    def verify_steps(self, f: FlatFunction, args: tuple[Any, ...], z: Array, value: Array) -> None:
        """Check on schedule whether f couples rows, which no report of a step strategy would show.

        It takes 2 log₂(batch) + 1 evaluations at z, which no count includes. A tracing backend does it where an eager
        transformation differentiates `value`; compiled code is never checked.
        """
        backend = self.backend
        z = backend.detach(z)
        differentiated = backend.capabilities.eager or backend.is_traced(value)
        wanted = differentiated and self.backward.on_failure != "ignore" and z.shape[0] not in (0, 1)
        if wanted and not backend.is_traced(z):
            self.watch(f).verify_steps(lambda: self.coupled_pair(f, args, z))

    def coupled_pair(self, f: FlatFunction, args: tuple[Any, ...], z: Array) -> tuple[int, int] | None:
        """Look for two samples, or units that may not be coupled, of which one changes when the other does."""
        from deqcore.linear.grouped import Groups

        backend = self.backend
        groups = Groups(backend, self.control.units)
        at = lambda z: backend.detach(backend.autodiff.forward_only(f, z, args, evaluate_once).z)  # noqa: E731
        with backend.errstate(), backend.guards.keep_random_state(z):
            return coupled_rows(backend, groups.joined(at), groups.join(z))

    def narrow(self, f: FlatFunction, args: tuple[Any, ...]) -> RestrictRows | None:
        """Return f for some samples only, if `forward.compact` is set."""
        if not self.compacts():
            return None
        f.check_batched(args)
        return lambda rows: f.on_rows(rows, args)

    def compacts(self) -> bool:
        """Return whether the solve drops rows that have stopped.

        Raises:
            ConfigError: it cannot.
        """
        if not self.forward.compact:
            return False
        if self.space.units > 1:
            raise ConfigError(
                "forward.compact must be false with forward.batch = 2, because f needs all units of a sample (got "
                "true). Set forward.compact = false."
            )
        if not self.backend.capabilities.compaction:
            raise ConfigError(
                f"forward.compact must be false for the backend {self.backend.name!r}, which traces its loops, so that "
                f"a batch keeps its size (got true). Set forward.compact = false."
            )
        return True

    def _resume(self, state: SolveState | None, z0: Array) -> LoopState | None:
        if state is None:
            return None
        if state.solver != repr(self.solver):
            raise InitialIterateError(
                f"The state must come from the solver of this call, {self.solver!r} (got {state.solver}). Continue "
                f"with the same solver and options, or start from z0 = sol.value."
            )
        z = state.carry.z
        if not self.backend.is_array(z) or self.backend.dtype_name(z) != self.space.dtype:
            raise InitialIterateError(
                f"The state must come from a solve of {self.space.dtype} arrays of {self.backend.name}, like z0 (got "
                f"{type(z).__module__}.{type(z).__name__} of {z.dtype}). Continue with arrays of the same kind."
            )
        if tuple(state.carry.z.shape) != tuple(z0.shape):
            raise InitialIterateError(
                f"The state must have the raveled shape {tuple(z0.shape)} of z0 (got {tuple(state.carry.z.shape)}). "
                f"Continue with the batch of the earlier solve."
            )
        return state.carry

    def unsolved(self, value: Array, reached: Reached | None) -> SolveResult:
        """Return the result of a strategy of fixed steps: its residual and status where f is known."""
        backend, xp = self.backend, self.backend.xp
        z = backend.detach(value)
        unknown = unmeasured(backend, z) if reached is None else xp.full_like(reached.residual, float("nan"))
        assert isinstance(self.strategy, StepStrategy)
        if reached is None or reached.steps is None:
            steps = xp.zeros_like(unknown, dtype=xp.int32) + self.strategy.steps
        else:
            steps = reached.steps
        status = xp.full_like(steps, int(Status.FIXED_STEPS))
        if reached is None or reached.fz is None:
            spent = steps if reached is None else reached.evaluations
            status = xp.where(xp.isfinite(backend.norm(z)), status, xp.full_like(status, int(Status.NONFINITE)))
            return SolveResult(z, None, unknown, status, steps, spent, None)
        with backend.errstate():
            residual = backend.norm(reached.fz - z)
            limits = Limits.of(backend.xp, backend.eps(z), self.control.rtol, self.control.atol, self.control.patience)
            size, mark = backend.norm(reached.fz), reached.residual
            met, _ = judged(xp, limits, residual, size, reached.scale, greater(xp, mark, residual), mark)
            met = met if reached.unsettled is None else met & ~reached.unsettled
        status = xp.where(met, xp.full_like(status, int(Status.CONVERGED)), status)
        status = xp.where(xp.isfinite(residual), status, xp.full_like(status, int(Status.NONFINITE)))
        return SolveResult(z, reached.fz, residual, status, steps, reached.evaluations, None)


def evaluate_once(f: Map, z: Array) -> SolveResult:
    """Evaluate f, for `Autodiff.forward_only`; the value is the `z` of the result."""
    return SolveResult(f(z), None, None, None, None, None, None)
