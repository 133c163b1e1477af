"""The contract of a backward strategy.

The forward pass solves `z* = f(z*, θ)` without recording a gradient. By the implicit function theorem the backward
pass needs

    dL/dθ = (∂f/∂θ)ᵀ u,    u = (I − J)^-T g,    J = ∂f/∂z at z*,

where g is the cotangent of z*. Implicit strategies differ only in how they find u: each is a `Strategy` and implements
`solve_adjoint`. The framework forms the last product with (∂f/∂θ)ᵀ by one ordinary recorded evaluation of f.

A strategy that differentiates through a fixed number of steps is a `StepStrategy`.

Source: Bai, Kolter & Koltun (2019), "Deep Equilibrium Models", Theorem 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Never, TypeAlias

from deqcore.abc.backend import Backend
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.abc.solver import Solver
from deqcore.errors import StrategyError
from deqcore.types import AdjointReport, Array, Map, Reached, SolveResult, Status

MakeSolver: TypeAlias = Callable[[str, Mapping[str, object]], Solver]


class Strategy(ABC):
    """An implicit backward strategy: a frozen dataclass of its options, registered under a name.

    Attributes:
        needs: what `solve_adjoint` uses with its default options; for other options, `uses_vjp` and `wants_estimate`.
        exact: whether `solve_adjoint` solves the adjoint equation to a tolerance, so that the result is a true
            derivative (which forward mode and second derivatives require).
        causal: whether u of a unit depends on the cotangents and iterates of that unit and of later ones that have a
            cotangent alone, to the last bit, for an f whose unit i reads units up to i only (`forward.batch = 2`).
        cost_bounds: golden problems whose adjoint equation it solves, each with an upper bound on the vjps per sample
            in float64, from the estimate H = −I if it wants one, as in ``{"slow-modes": 12}``. The conformance suite
            checks these bounds, with the default options.

    Example:
        >>> import numpy as np, deqcore
        >>> from dataclasses import dataclass, field
        >>> @dataclass(frozen=True)
        ... class TwoTerms(Strategy):
        ...     needs = "vjp"
        ...     def solve_adjoint(self, backend, vjp, g, estimate):
        ...         return g + vjp(g), report(backend, g, vjps=1)
        >>> be = deqcore.get_backend(backend="numpy")
        >>> u, adjoint_report = TwoTerms().solve_adjoint(be, lambda v: 0.5 * v, np.ones((1, 2)), None)
        >>> u.tolist(), adjoint_report.vjps.tolist()
        ([[1.5, 1.5]], [1])
    """

    needs: ClassVar[Literal["nothing", "vjp", "estimate"]]
    exact: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    cost_bounds: ClassVar[Mapping[str, int]] = {}

    @abstractmethod
    def solve_adjoint(
        self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian | None
    ) -> tuple[Array, AdjointReport]:
        """Return `u ≈ (I − J)^-T g` and a report.

        Args:
            backend: the backend of these arrays.
            vjp: `u ↦ Jᵀu` at z*, `(batch, n)` to `(batch, n)`; each call costs one vector–Jacobian product.
            g: cotangent of z*, `(batch, n)`.
            estimate: H ≈ (J − I)^-1 from the forward solve, or None if `needs` is not "estimate".
        """

    def uses_vjp(self) -> bool:
        """Return whether `solve_adjoint` may call `vjp` with these options; if not, no graph of f is recorded."""
        return self.needs == "vjp"

    def wants_estimate(self) -> bool:
        """Return whether `solve_adjoint` reads the estimate with these options; the solver must then have one."""
        return self.needs == "estimate"

    def wants_secants(self) -> bool:
        """Return whether the estimate should be `Solver.secant_estimate` instead of `Solver.inverse_jacobian`."""
        return False

    def bind(self, make_solver: MakeSolver) -> Strategy:
        """Resolve the names of solvers among the options. Called once, before any solve."""
        return self


class StepStrategy(ABC):
    """A strategy that differentiates through its own steps, recorded by the framework (phantom, unrolled).

    If it solves first, `sol.value` is the solution, whose residual and status are reported, with the derivative of the
    steps. Otherwise `sol.value` is the result of the steps.

    Attributes:
        steps: steps that it takes if it does not solve first, for `sol.steps`.
        causal: as for `Strategy`; the value of a unit depends on later ones through f alone, too.

    Example:
        >>> import numpy as np, deqcore
        >>> class OneStep(StepStrategy):
        ...     def value(self, backend, f, z0, forward, solver):
        ...         return f(z0 if forward is None else forward.z)
        ...     def solves(self):
        ...         return False
        >>> be = deqcore.get_backend(backend="numpy")
        >>> OneStep().value(be, lambda z: 0.5 * z + 1.0, np.zeros((1, 2)), None, None).tolist()
        [[1.0, 1.0]]
    """

    steps: int = 0
    causal: ClassVar[bool] = False

    @abstractmethod
    def value(
        self, backend: Backend, f: Map, z0: Array, forward: SolveResult | None, solver: Solver
    ) -> Array | Reached:
        """Return the differentiable value `(batch, n)`, or a `Reached` if f(value), and so the residual, is known.

        Args:
            backend: the backend of these arrays.
            f: the map, recorded by the framework.
            z0: the initial iterate `(batch, n)`.
            forward: the solution, without a gradient, or None if `solves` is False.
            solver: the configured method, for a strategy that records its steps.
        """

    def value_at(
        self, backend: Backend, f: Map, z0: Array, forward: SolveResult | None, solver: Solver, step: Any
    ) -> Array | Reached:
        """Return `value` at a training step, for a strategy that draws random numbers.

        Args:
            backend: as in `value`.
            f: as in `value`.
            z0: as in `value`.
            forward: as in `value`.
            solver: as in `value`.
            step: the setting `backward.step`, an integer or a traced scalar. Drawing from it and a seed alone gives
                every rank the same numbers.
        """
        return self.value(backend, f, z0, forward, solver)

    def truncates(self) -> bool:
        """Return whether steps of its own before the recorded ones carry no gradient (truncated backpropagation)."""
        return False

    def solves(self) -> bool:
        """Return whether the fixed point is solved for first."""
        return True


def refuse_vjp(u: Array) -> Never:
    """Take the place of `vjp` for a strategy that declares that it does not use it.

    Raises:
        StrategyError: always.
    """
    raise StrategyError("The strategy called vjp, although its uses_vjp() returns False. Make uses_vjp() return True.")


def relative(backend: Backend, a: Array, b: Array) -> Array:
    """Return a / b per sample in the wide dtype, zero where b is zero, but NaN where b is NaN."""
    xp = backend.xp
    a, b = backend.to_accum_dtype(a), backend.to_accum_dtype(b)
    return xp.where(b == 0, xp.zeros_like(a), a / xp.where(b == 0, xp.ones_like(b), b))


def report(
    backend: Backend,
    g: Array,
    *,
    status: Array | None = None,
    vjps: Array | int = 0,
    residual: Array | None = None,
    error: Array | None = None,
    fallback: Array | None = None,
) -> AdjointReport:
    """Fill an AdjointReport; fields that are not given become "not measured".

    Args:
        backend: the backend of these arrays.
        g: the cotangent `(batch, n)`.
        status: `Status` per sample `(batch,)` int32; default CONVERGED, and NONFINITE where the residual is not finite.
        vjps: products Jᵀv spent, `(batch,)` int32 or one number for all.
        residual: ‖g + Jᵀu − u‖ / ‖g‖ `(batch,)`.
        error: estimated relative error of u `(batch,)`.
        fallback: which samples got the fallback, `(batch,)` of bool.

    Returns:
        A report whose leaves are all `(batch,)`.

    Example:
        >>> import numpy as np, deqcore
        >>> from deqcore import Status
        >>> be = deqcore.get_backend(backend="numpy")
        >>> filled = report(be, np.ones((2, 3)), vjps=4, residual=np.array([1e-6, np.inf]))
        >>> filled.vjps.tolist(), [Status(code).name for code in filled.status.tolist()]
        ([4, 4], ['CONVERGED', 'NONFINITE'])
    """
    xp = backend.xp
    zeros = backend.norm(g[:, :0])
    ints = xp.zeros_like(zeros, dtype=xp.int32)
    unknown = xp.full_like(zeros, float("nan"))
    if status is None:
        status = ints + int(Status.CONVERGED)
        if residual is not None:
            status = xp.where(xp.isfinite(residual), status, xp.full_like(status, int(Status.NONFINITE)))
    return AdjointReport(
        status=status,
        vjps=ints + vjps if isinstance(vjps, int) else vjps,
        residual=unknown if residual is None else residual,
        error=unknown if error is None else error,
        fallback=ints > 0 if fallback is None else fallback,
        coupling=unknown,
        verify_vjps=ints,
        gradient_error=unknown,
        gradient_cosine=unknown,
        gradient_products=ints,
        per_sample=ints > 0,
    )
