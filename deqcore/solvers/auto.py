"""The default method: fixed-point iteration that accelerates, and escalates, only the samples that need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Final, TypeAlias

from deqcore.abc.backend import Backend
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.scaling import divide_rows
from deqcore.abc.solver import Solver
from deqcore.errors import BackendError
from deqcore.linear.gmres import LinearSolution
from deqcore.linear.norms import residual_norms
from deqcore.solvers.anderson import Anderson, AndersonState
from deqcore.solvers.auto_state import AutoState, Moved, kept, skipped
from deqcore.solvers.levels import ACCELERATED, NEWTON, PLAIN, Progress, Rules, progressed
from deqcore.solvers.newton_krylov import NewtonKrylov, NewtonState
from deqcore.solvers.plain_steps import PlainSteps, measured, plain_step
from deqcore.types import Array, Map

TRIAL: Final = 3  # histories full of accelerated steps, after which they are compared with plain ones
HUGE: Final = 1e6  # growth of a refused residual above which its difference has no information on the slope


_Step: TypeAlias = tuple[Array, Array, AutoState]


@dataclass(frozen=True)
class Auto(Solver):
    """Fixed-point iteration, accelerated for the samples for which that pays, with Newton–Krylov as the last resort.

    Each sample starts with plain steps, z₊ = f(z), and moves up by its own residuals g = f(z) − z:

    - *plain* → *accelerated* (Anderson) when a step leaves more than `slow` of ‖g‖, and so do the last two together, or
      after `plain_steps` steps. While f contracts faster, plain steps need about as many evaluations, without a history
      or passes over one. The first step may double ‖g‖.
    - *accelerated* → *plain* when 3·`history_size` steps have gained less than 1.4 plain steps each did before. This is
      decided once; then plain steps continue while they keep half of that gain.
    - *accelerated* → *Newton* when ‖g‖ has not halved in `patience` steps. A step to more than
      `max_residual_growth` times the least ‖g‖ is refused: the sample stays, uses the difference that the step has
      shown, and the step counts as half of `patience`.

    The rules read residuals and counts only, never a clock, so a solve is reproducible, and a sample's iterates do not
    depend on its batch mates. Histories are allocated when the first sample accelerates (eager backends), and passes
    over them are skipped until then.

    Use it when in doubt: it is the default. Its estimate of the inverse Jacobian is that of Anderson, H = −I for
    samples that never accelerated (see `InverseJacobian.known`); for reuse in the backward pass, `broyden` keeps more.

    Cost: one evaluation of f per step, and per Newton step one per product J v and per halving. No history until a
    sample accelerates, then 2·history_size vectors.

    Args:
        history_size: differences kept, at least 1.
        slow: part of the residual that a plain step may leave, above 0 and at most 1.
        plain_steps: plain steps of a sample at most, at least 1.
        patience: steps without a halved residual before Newton–Krylov, at least 1.
        max_residual_growth: growth over the least residual that is refused, above 1.
        escalate: whether Newton–Krylov takes samples that acceleration does not solve. Without it compiled code is
            smaller: JAX compiles in a third of the time.
        history_dtype: dtype of the stored differences, default the state's own.

    Raises:
        ValueError: an option is out of its range. In settings it becomes a ConfigError that names the setting.

    Source: Walker & Ni (2011), "Anderson acceleration for fixed-point iterations"; Knoll & Keyes (2004), "Jacobian-free
    Newton–Krylov methods"; the rules and their study: docs/notes.

    Example:
        >>> import numpy as np, deqcore
        >>> sol = deqcore.fixed_point(lambda z: 3 * np.cos(z), np.ones((1, 1)), forward__solver="auto",
        ...                           forward__rtol=1e-10)
        >>> round(float(sol.value[0, 0]), 6), bool(sol.converged[0])
        (1.170121, True)
    """

    history_size: int = 8
    slow: float = 0.75
    plain_steps: int = 28
    patience: int = 15
    max_residual_growth: float = 10.0
    escalate: bool = True
    history_dtype: str | None = None
    has_estimate: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    cost_bounds: ClassVar[Mapping[str, int]] = {
        "affine": 32,
        "conv": 35,
        "expansive": 15,
        "ill-conditioned": 26,
        "mlp": 32,
        "monotone": 20,
        "overshoot": 24,
        "ring": 40,
        "slow-modes": 106,
        "tree": 35,
        "walled": 51,
    }

    def __post_init__(self) -> None:
        _ = self.anderson
        if not 0.0 < self.slow <= 1.0:
            raise ValueError(f"slow must be above 0 and at most 1 (got {self.slow})")
        if self.plain_steps < 1:
            raise ValueError(f"plain_steps must be at least 1 (got {self.plain_steps})")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1 (got {self.patience})")

    @cached_property
    def anderson(self) -> Anderson:
        """The method of accelerated samples."""
        return Anderson(
            history_size=self.history_size,
            max_residual_growth=self.max_residual_growth,
            history_dtype=self.history_dtype,
        )

    @cached_property
    def newton(self) -> NewtonKrylov:
        """The method of the last resort."""
        return NewtonKrylov(inner_steps=30)

    @cached_property
    def _plain(self) -> PlainSteps:
        return PlainSteps(self._rules(self.escalate), self.anderson, self.newton)

    def init(self, backend: Backend, z: Array, fz: Array) -> AutoState:
        """Return the state of a batch of plain samples."""
        return self._plain.begun(backend, fz, *measured(backend, z, fz))

    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: AutoState) -> _Step:
        """Take one step of each sample's own method."""
        level, active = state.progress.level, state.memory.values.active
        if active is not None:  # samples that have stopped need nothing
            level = backend.xp.where(active, level, backend.xp.zeros_like(level))
        if backend.known_all(level == PLAIN):
            start = z, fz, state.progress, state.size
            z, fz, progress, size = plain_step(backend, self.rules(backend), f, start, active)
            return z, fz, AutoState(skipped(state.memory), progress, state.newton, size)
        return self._mixed(backend, f, z, fz, state, level)

    def _mixed(self, backend: Backend, f: Map, z: Array, fz: Array, state: AutoState, level: Array) -> _Step:
        """Take a step with samples of all levels."""
        accelerated = level == ACCELERATED
        memory = self.opened(backend, z, fz, state, accelerated)
        moved: list[Moved] = []

        def evaluate(point: Array) -> Array:
            moved.append(self._evaluated(backend, f, z, fz, point, state, level == NEWTON))
            return moved[-1].fz

        def evaluate_active(point: Array) -> Array:  # a kernel may leave the other samples where they were
            return evaluate(point if backend.known_all(accelerated) else backend.select(accelerated, point, fz))

        fused = None if backend.kernels is None else backend.kernels.step(self.anderson, evaluate_active, z, fz, memory)
        if fused is None:
            evaluate(backend.cond(accelerated, lambda point: self.anderson.point(backend, point, memory), fz))
            stored, size = self._stored(backend, moved[-1], fz, memory, accelerated), None
        else:
            stored, size = fused.state, fused.size
        norm = stored.norm
        if size is None or not backend.known_all(accelerated):  # a kernel measures the samples that it moves
            norm, size = residual_norms(backend, moved[-1].z, moved[-1].fz)
        active = state.memory.values.active
        progress, refused = progressed(backend, self.rules(backend), norm, state.progress, active)
        values, residuals = stored.values.masked(active), stored.residuals.masked(active)
        stored = stored._replace(values=values, residuals=residuals, residual=state.memory.residual, norm=progress.norm)
        result = moved[-1].z, moved[-1].fz, AutoState(stored, progress, moved[-1].newton, size)
        return result if refused is None else self.taken_back(backend, refused, norm, (z, fz, state), result)

    def opened(self, backend: Backend, z: Array, fz: Array, state: AutoState, accelerated: Array) -> AndersonState:
        """Return the memory with the residual of the iterate, in which only accelerated samples write."""
        memory = state.memory
        residual = divide_rows(backend, fz - z, memory.unit)
        memory = memory._replace(residual=residual, norm=state.progress.norm)
        if backend.known_all(accelerated):
            return memory
        return memory._replace(values=memory.values.masked(accelerated), residuals=memory.residuals.masked(accelerated))

    def _stored(
        self, backend: Backend, end: Moved, fz: Array, memory: AndersonState, accelerated: Array
    ) -> AndersonState:
        """Return the memory with the new differences of accelerated samples."""
        residual = end.fz - end.z
        norm = backend.norm(residual)
        if backend.known_all(~accelerated):
            return skipped(memory)._replace(norm=norm)
        # Outside of the condition, because compiled code copies a whole history where only one branch writes to it.
        appended, length = self.anderson.appended(backend, fz, end.fz, residual, norm, memory)
        rows = memory.values.active

        def weigh(state: AndersonState) -> AndersonState:
            masked = state._replace(values=state.values.masked(rows), residuals=state.residuals.masked(rows))
            return self.anderson.weighed(backend, memory.norm, length, masked)

        weighed: AndersonState = backend.cond(accelerated, weigh, appended)
        return kept(backend, accelerated, weighed, memory)

    def _evaluated(
        self, backend: Backend, f: Map, z: Array, fz: Array, point: Array, state: AutoState, rows: Array
    ) -> Moved:
        """Return `point` and f there, but in `rows` the point of a Newton step that has lowered the residual."""
        if not self._escalates(backend) or backend.known_all(~rows):
            return Moved(point, f(point), state.newton)
        xp, newton, before = backend.xp, state.newton, state.progress.norm
        still = LinearSolution(
            xp.zeros_like(z), xp.zeros_like(newton.forcing), xp.zeros_like(newton.spent), rows, ~rows
        )

        def aim(carry: tuple[Array, LinearSolution]) -> tuple[Array, LinearSolution]:
            g = backend.select(rows, fz - z, xp.zeros_like(z))
            try:
                direction = self.newton.direction(backend, f, z, g, newton.forcing)
            except BackendError:  # f has no products: a damped step
                direction = still._replace(x=g, residual=backend.to_accum_dtype(before))
            return backend.select(rows, z + direction.x, carry[0]), direction._replace(converged=rows)

        ahead, inner = backend.cond(rows, aim, (point, still))
        value = f(ahead)

        def search(carry: Moved) -> Moved:
            wanted = xp.where(rows, before, xp.zeros_like(before))
            end = self.newton.searched(backend, f, z, inner.x, wanted, (carry.z, carry.fz))
            after = self.newton.measured(backend, inner, before, end, newton)
            return Moved(
                end.z, end.fz, NewtonState(*(xp.where(rows, *pair) for pair in zip(after, newton, strict=True)))
            )

        moved: Moved = backend.cond(rows, search, Moved(ahead, value, newton))
        return moved

    def rules(self, backend: Backend) -> Rules:
        """Return the numbers of the rules."""
        return self._rules(self._escalates(backend))

    def _rules(self, escalates: bool) -> Rules:
        trial = TRIAL * self.history_size
        return Rules(self.slow, self.plain_steps, self.patience, self.max_residual_growth, escalates, trial)

    def _escalates(self, backend: Backend) -> bool:
        return self.escalate and backend.capabilities.jvp

    def taken_back(
        self, backend: Backend, refused: Array, norm: Array, before: tuple[Array, Array, AutoState], result: _Step
    ) -> _Step:
        """Take the samples `refused` back to the iterate before the step, with what the step has shown."""
        (z, fz, start), (moved, value, state) = before, result
        usable = norm <= HUGE * start.progress.best

        def back(memory: AndersonState) -> AndersonState:
            return self.anderson.returned(backend, rows, usable, start.memory.target, memory)

        rows = refused & (start.progress.level == ACCELERATED)
        # Where a plain sample is refused, too: a history may have planned the next point of all samples.
        memory = backend.cond(refused, back, state.memory)
        size = backend.xp.where(refused, start.size, state.size)
        state = AutoState(memory, state.progress, state.newton, size)
        return backend.select(refused, z, moved), backend.select(refused, fz, value), state

    def opening(self) -> PlainSteps:
        """Return the plain steps alone."""
        return self._plain

    def for_coupled_units(self) -> Solver:
        """Return the method without Newton–Krylov, which evaluates f several times in a step."""
        return replace(self, escalate=False)

    def restarted(self, backend: Backend, rows: Array, z: Array, state: AutoState) -> AutoState:
        """Return the state of plain samples in `rows`; those of Newton–Krylov stay with it."""
        xp, old = backend.xp, state.progress
        nothing, unknown = xp.zeros_like(old.norm), xp.full_like(old.norm, float("inf"))
        plain = rows & (old.level != NEWTON)
        progress = Progress(
            level=xp.where(plain, xp.zeros_like(old.level), old.level),
            norm=xp.where(rows, nothing, old.norm),
            best=xp.where(rows, unknown, old.best),
            mark=xp.where(rows, unknown, old.mark),
            since=xp.where(rows, xp.zeros_like(old.since), old.since),
            rate=xp.where(rows, nothing, old.rate),
        )
        memory = self.anderson.restarted(backend, rows, z, state.memory)
        size = xp.where(rows, backend.norm(z), state.size)
        return AutoState(memory, progress, self.newton.restarted(backend, rows, z, state.newton), size)

    def residual_norm(self, backend: Backend, state: AutoState) -> Array:
        """Return the norm that the rules have read."""
        return state.progress.norm

    def output_norm(self, backend: Backend, state: AutoState) -> Array:
        """Return the norm that was measured with it."""
        return state.size

    def evaluations(self, backend: Backend, steps: Array, state: AutoState) -> Array:
        """Return the count of evaluations, and of products in Newton steps."""
        return 1 + steps + state.newton.spent

    def inverse_jacobian(self, backend: Backend, state: AutoState) -> InverseJacobian:
        """Return the multi-secant estimate from the differences of accelerated samples, and −I for the others."""
        return self.anderson.inverse_jacobian(backend, state.memory)
