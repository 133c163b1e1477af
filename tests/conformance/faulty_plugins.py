"""Plugins of a third party, each with one fault that gives a wrong answer with a status that says it is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from deqcore_numpy.autodiff import NumpyAutodiff
from deqcore_numpy.backend import NumpyBackend
from deqcore_numpy.history import NumpyHistory
from external_adapters import Right

from deqcore import Solver, plugins
from deqcore.abc.backward import StepStrategy, Strategy, report
from deqcore.abc.external import ExternalResult
from deqcore.abc.host import HostViews
from deqcore.abc.kernels import FusedKernels
from deqcore.linear.norms import residual_norms
from deqcore.types import Reached, Status

# -- backends -----------------------------------------------------------------------------------------------------


class MetByGrowth(NumpyBackend):
    """A fused verdict with the textbook criterion: residual ≤ rtol·‖f(z)‖."""

    name: ClassVar[str] = "met-by-growth"

    class _Textbook(FusedKernels):
        def update(self, before: Any, result: Any, residual: Any, size: Any, limits: Any) -> Any:
            return _update(before, result, residual, self.be.norm(result.fz), limits)

    kernels_class = _Textbook
    host_class = HostViews  # the loop that calls `update`


def _update(before: Any, result: Any, residual: Any, size: Any, limits: Any) -> Any:
    met = residual <= limits.rtol * size
    running = before.status == int(Status.RUNNING)
    status = np.where(running & met, int(Status.CONVERGED), before.status).astype(np.int32)
    z, fz = (np.where(running[:, None], *pair) for pair in ((result.z, before.z), (result.fz, before.fz)))
    steps = before.steps + running.astype(np.int32)
    return before._replace(z=z, fz=fz, best_z=z, best_fz=fz, best_residual=residual, status=status, steps=steps)


class BlockDiagonal(NumpyBackend):
    """Derivatives row by row, whether or not f couples rows."""

    name: ClassVar[str] = "block-diagonal"

    class _Autodiff(NumpyAutodiff):
        def linearize(self, f: Any, z: Any) -> Any:
            n, step = z.shape[1], 1e-6
            columns = [(f(z + step * unit) - f(z - step * unit)) / (2 * step) for unit in np.eye(n)]
            jacobian = np.stack(columns, axis=2)
            return f(z), lambda u: np.einsum("bij,bi->bj", jacobian, u)

    autodiff_class = _Autodiff


class ValueOfF(NumpyBackend):
    """The value is f(z), the residual is that of z."""

    name: ClassVar[str] = "value-of-f"

    class _Autodiff(NumpyAutodiff):
        def implicit(self, f: Any, z0: Any, args: Any, solve: Any, adjoint: Any) -> Any:
            forward = self.forward_only(f, z0, args, solve)
            return forward.fz, forward, None

    autodiff_class = _Autodiff


class SumsOfSquares(NumpyBackend):
    """A norm whose squares leave the range."""

    name: ClassVar[str] = "sums-of-squares"

    def norm(self, v: Any) -> Any:
        return np.sqrt((v * v).sum(axis=1))


class OldVectors(NumpyBackend):
    """A history that keeps the vectors of an earlier problem."""

    name: ClassVar[str] = "old-vectors"

    def history(self, like: Any, slots: int, dtype: str | None = None) -> Any:
        return _Old.of(super().history(like, slots, dtype))


class _Old(NumpyHistory):
    @classmethod
    def of(cls, made: NumpyHistory) -> _Old:
        return cls(made.storage, made.seen, made.dtype, made.written, made.active)

    def append(self, v: Any) -> _Old:
        return self.of(super().append(v))

    def copy(self) -> _Old:
        return self.of(super().copy())

    def merge(self, rows: Any, other: Any) -> Any:
        return NumpyHistory(self.storage, self.seen | other.seen, self.dtype, self.written, self.active)


# -- solvers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared(Solver):
    """Aitken's factor of the whole batch: the steps of a sample depend on the others."""

    def init(self, backend: Any, z: Any, fz: Any) -> Any:
        return ()

    def step(self, backend: Any, f: Any, z: Any, fz: Any, state: Any) -> Any:
        xp, again = backend.xp, f(fz)
        first, second = fz - z, again - fz
        change = second - first
        total = xp.sum(change * change)
        factor = xp.where(total > 0, -xp.sum(first * change) / xp.where(total > 0, total, total + 1.0), total + 1.0)
        factor = backend.cast(xp.clip(factor, 0.1, 3.0), z)
        new = z + factor * first
        return new, f(new), state

    evaluations_per_step = 2


@dataclass(frozen=True)
class Ridge(Solver):
    """Anderson's mixing of depth one, regularised by a number and not by a share."""

    evaluations_per_step = 1

    def init(self, backend: Any, z: Any, fz: Any) -> Any:
        return (z, fz)

    def step(self, backend: Any, f: Any, z: Any, fz: Any, state: Any) -> Any:
        last, last_fz = state
        change = (fz - z) - (last_fz - last)
        along = backend.inner(change, fz - z) / (backend.inner(change, change) + 1e-2)
        new = fz - backend.cast(along, z)[:, None] * (fz - last_fz)
        return new, f(new), (z, fz)


class RunsAway(Right):
    """An adapter that calls residual ≤ rtol·‖f(z)‖ a success, after any growth."""

    def solve(self, f: Any, z0: Any, args: Any, *, rtol: float, max_steps: int) -> ExternalResult:
        z, count = z0, 1
        with np.errstate(all="ignore"):
            for _ in range(max_steps):
                fz = f(z, *args)
                count += 1
                if not self._far(z, fz, rtol).any():
                    break
                z = z + 4.0**count * (fz - z) if np.abs(fz - z).min() > 0.4 else fz
        return ExternalResult(z, ~self._far(z, f(z, *args), rtol), count)


# -- strategies ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowByRow(Strategy):
    """Solves a dense system per row, which it finds by one product per column."""

    exact = True
    needs: ClassVar[str] = "vjp"

    def solve_adjoint(self, backend: Any, vjp: Any, g: Any, estimate: Any) -> Any:
        xp, n = backend.xp, g.shape[1]
        columns = [vjp(xp.zeros_like(g) + backend.asarray(unit, like=g)) for unit in np.eye(n)]
        matrix = backend.asarray(np.eye(n), like=g)[None] - xp.stack(columns, axis=2)
        u = backend.linalg.solve(matrix, g)
        return u, report(backend, g, vjps=n, status=Status.CONVERGED, residual=0.0 * backend.norm(g))


@dataclass(frozen=True)
class Frozen(StepStrategy):
    """Plain steps; a sample whose value has converged takes no more."""

    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1 (got {self.steps}).")

    def solves(self) -> bool:
        return False

    def value(self, backend: Any, f: Any, z0: Any, forward: Any, solver: Any) -> Reached:
        z = backend.detach(z0)
        fz = first = f(z)
        for _ in range(self.steps):
            residual, size = residual_norms(backend, backend.detach(z), backend.detach(fz))
            done = residual <= 1e-6 * size
            z = backend.select(done, z, fz)
            fz = backend.select(done, fz, f(z))
        residual, size = residual_norms(backend, backend.detach(z0), backend.detach(first))
        spent = backend.xp.zeros_like(residual, dtype=backend.xp.int32) + self.steps + 1
        return Reached(z, fz, spent, size, residual)


BACKENDS = (MetByGrowth, BlockDiagonal, ValueOfF, SumsOfSquares, OldVectors)
SOLVERS = {"shared": Shared, "ridge": Ridge, "runs-away": RunsAway}
STRATEGIES = {"row-by-row": RowByRow, "frozen": Frozen}


def register() -> None:
    """Register all of them in this process."""
    for backend in BACKENDS:
        plugins.register(plugins.BackendSpec(backend.name, f"{__name__}:{backend.__name__}", array_modules=("numpy",)))
    for name, solver in SOLVERS.items():
        plugins.register(plugins.SolverSpec(name, f"{__name__}:{solver.__name__}"))
    for name, strategy in STRATEGIES.items():
        plugins.register(plugins.StrategySpec(name, f"{__name__}:{strategy.__name__}"))
