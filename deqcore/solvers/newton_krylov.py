"""Newton's method with a matrix-free GMRES inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.scaling import divide_rows, multiply_rows, row_scale
from deqcore.abc.solver import Solver
from deqcore.errors import BackendError, ConfigError
from deqcore.linear.gmres import LinearSolution, gmres
from deqcore.types import Array, Map


class NewtonState(NamedTuple):
    """Forcing term η of the next inner solve `(batch,)`, and products and trials spent so far `(batch,)` int32."""

    forcing: Array
    spent: Array


class Trial(NamedTuple):
    """Backtracking along one Newton step."""

    z: Array
    fz: Array
    length: Array
    residual: Array
    searching: Array
    trials: Array


@dataclass(frozen=True)
class NewtonKrylov(Solver):
    """Newton–Krylov: solve (I − J) d = f(z) − z by GMRES with products J v, then z ← z + λ d.

    It converges fast near a solution for any spectrum of J, so it also solves problems that are not contractions, and
    slow modes cost only as many products as GMRES needs to find them. The inner tolerance η is the error of the linear
    model in the step before, relative to the residual (Eisenstat & Walker): if f is nearly linear, the second step is
    solved to the end. λ is halved, per sample, until the residual falls.

    Cost: per step one evaluation of f, one per product J v (counted as evaluations; in forward mode it costs
    about two of them, in PyTorch mostly about one vjp) and one per halving; `inner_steps` + 1 history vectors.

    Args:
        inner_steps: size of the Krylov space at most.
        forcing: first inner tolerance η, in (0, 1).
        halvings: at most this many per step.

    Raises:
        ValueError: an option is out of its range. In settings it becomes a ConfigError that names the setting.

    Source: Knoll & Keyes (2004), "Jacobian-free Newton–Krylov methods"; η: Eisenstat & Walker (1996), choice 1, and
    choice 2 with γ = 0.9, α = 2 after a step with λ < 1.

    Example:
        >>> import numpy as np, deqcore
        >>> sol = deqcore.fixed_point(lambda z: 3 * np.cos(z), np.ones((1, 1)), forward__solver="newton-krylov",
        ...                           forward__rtol=1e-10)
        >>> round(float(sol.value[0, 0]), 6), int(sol.steps[0])
        (1.170121, 3)
    """

    inner_steps: int = 50
    forcing: float = 0.1
    halvings: int = 5
    needs: ClassVar[tuple[str, ...]] = ("jvp",)
    cost_bounds: ClassVar[Mapping[str, int]] = {
        "affine": 12,
        "conv": 45,
        "expansive": 22,
        "ill-conditioned": 11,
        "mlp": 33,
        "monotone": 29,
        "overshoot": 28,
        "ring": 43,
        "slow-modes": 58,
        "tree": 47,
        "walled": 35,
    }

    def __post_init__(self) -> None:
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps must be at least 1 (got {self.inner_steps})")
        if not 0.0 < self.forcing < 1.0:
            raise ValueError(f"forcing must be between 0 and 1 (got {self.forcing})")
        if self.halvings < 0:
            raise ValueError(f"halvings must be at least 0 (got {self.halvings})")

    def init(self, backend: Backend, z: Array, fz: Array) -> NewtonState:
        """Return the state with the first inner tolerance and nothing spent."""
        norm = backend.to_accum_dtype(backend.norm(z))
        return NewtonState(
            backend.xp.full_like(norm, self.forcing), backend.xp.zeros_like(norm, dtype=backend.xp.int32)
        )

    def for_coupled_units(self) -> Solver:
        """Refuse: the products of one unit's linear system contain the other units' directions.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "forward.solver = 'newton-krylov' solves a linear system for each unit alone, so it must not be used where "
            "f couples units (got forward.batch = 2). Use forward.solver = 'auto', 'anderson', 'broyden' or 'picard', "
            "forward.batch = true for one system per sample, or forward.coupled = false if f treats each unit alone."
        )

    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: NewtonState) -> tuple[Array, Array, Any]:
        """Take one Newton step with backtracking."""
        g = fz - z
        inner = self.direction(backend, f, z, g, state.forcing)
        first = z + inner.x
        end = self.searched(backend, f, z, inner.x, backend.norm(g), (first, f(first)))
        return end.z, end.fz, self.measured(backend, inner, backend.norm(g), end, state)

    def direction(self, backend: Backend, f: Map, z: Array, g: Array, forcing: Array) -> LinearSolution:
        """Return d with (I − J) d = g `(batch, n)` to the tolerance `forcing` `(batch,)`.

        Raises:
            BackendError: f has no products J v here.
        """
        jvp = backend.autodiff.jvp(f, z)
        if jvp is None:
            raise BackendError.no_products(f"the backend {backend.name!r} has none.")
        unit = row_scale(backend, backend.norm(g), g)

        def product(v: Array) -> Array:
            return v - _in_units(backend, jvp(_from_units(backend, v, unit)), unit)

        solution = gmres(
            backend,
            product,
            _in_units(backend, g, unit),
            rtol=forcing,
            max_steps=self.inner_steps,
            reorthogonalize=False,
        )
        left = solution.residual if unit is None else solution.residual * backend.to_accum_dtype(unit)
        return solution._replace(x=_from_units(backend, solution.x, unit), residual=left)

    def searched(
        self, backend: Backend, f: Map, z: Array, d: Array, before: Array, first: tuple[Array, Array]
    ) -> Trial:
        """Return z + λ d with the largest λ of 1, ½, ¼ … whose residual is below `before` `(batch,)`.

        Args:
            backend: the backend of these arrays.
            f: the map.
            z: the iterate `(batch, n)`.
            d: the direction.
            before: ‖f(z) − z‖, or 0 for a sample that takes the first point whatever its residual is.
            first: the first point and f there.
        """
        xp = backend.xp
        residual = backend.norm(first[1] - first[0])
        longer = ~(residual < before) & (before > 0.0)
        none = xp.zeros_like(before, dtype=xp.int32)
        trial = Trial(*first, xp.ones_like(before), residual, longer, none)

        def searching(t: Trial) -> Array:
            return xp.any(t.searching)

        def halve(t: Trial) -> Trial:
            length = 0.5 * t.length
            moved = z + backend.cast(length, z)[:, None] * d
            value = f(moved)
            residual = backend.norm(value - moved)
            return Trial(
                backend.select(t.searching, moved, t.z),
                backend.select(t.searching, value, t.fz),
                xp.where(t.searching, length, t.length),
                xp.where(t.searching, residual, t.residual),
                t.searching & ~(residual < before),
                t.trials + xp.astype(t.searching, xp.int32),
            )

        end: Trial = backend.loop(searching, halve, trial, self.halvings)
        return end

    def measured(
        self, backend: Backend, inner: LinearSolution, before: Array, end: Trial, state: NewtonState
    ) -> NewtonState:
        """Return the state after a step from a residual of norm `before`."""
        xp = backend.xp
        after, size = backend.to_accum_dtype(end.residual), backend.to_accum_dtype(before)
        ratio = after / size
        # The error of the linear model sets how finely to solve it; a shortened step does not measure that error.
        forcing = xp.where(end.length == 1.0, xp.abs(after - inner.residual) / size, 0.9 * ratio * ratio)
        forcing = xp.clip(forcing, min(2.0 * backend.eps(end.z) ** 0.5, self.forcing), self.forcing)
        forcing = xp.where(xp.isfinite(forcing), forcing, state.forcing)
        return NewtonState(forcing, state.spent + inner.products + end.trials)

    def restarted(self, backend: Backend, rows: Array, z: Array, state: NewtonState) -> NewtonState:
        """Return the state with the first inner tolerance in `rows`; the counts of products stay."""
        forcing = backend.xp.where(rows, backend.xp.full_like(state.forcing, self.forcing), state.forcing)
        return state._replace(forcing=forcing)

    def evaluations(self, backend: Backend, steps: Array, state: NewtonState) -> Array:
        """Return the count of evaluations and products."""
        return 1 + steps + state.spent


def _in_units(backend: Backend, v: Array, unit: Array | None) -> Array:
    """Return `v / unit` with the derivative of `v`.

    Recorded, f'' must see vectors of the residual's size and not of length 1, or its products leave the range before f
    does. All cotangents between `_in_units` and `_from_units` are in these units too, since both have the derivative 1.
    """
    if unit is None:
        return v
    return backend.autodiff.straight_through(divide_rows(backend, backend.detach(v), unit), v)


def _from_units(backend: Backend, v: Array, unit: Array | None) -> Array:
    """Return `v * unit` with the derivative of `v`; see `_in_units`."""
    if unit is None:
        return v
    return backend.autodiff.straight_through(multiply_rows(backend, backend.detach(v), unit), v)
