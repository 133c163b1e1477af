"""Optional fused kernels: compiled code that does several operations of a step in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from deqcore.abc.arrays import ArrayOps
from deqcore.abc.history import History
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.types import Array, Limits, LoopState, Map, StepResult


class Krylov(NamedTuple):
    """A Krylov space of at most m steps per sample. Small arrays are in the wide dtype."""

    basis: History  # orthonormal v_0 … v_k, m + 1 slots
    columns: History  # columns of the Hessenberg matrix H̄, m slots: m + 1 entries, then the one-hot `source_slot`
    v: Array  # latest basis vector (batch, n)
    source_slot: Array  # one-hot of its slot (batch, m + 1): not the latest one for a sample that paused
    null_vector: Array  # ν with νᵀH̄ = 0 (batch, m + 1)
    null_norm_sq: Array  # ‖ν‖² (batch,)
    start: Array  # ‖r₀‖ (batch,)
    residual: Array  # ‖b − A x‖ (batch,)
    can_grow: Array  # can this space still grow? (batch,) of bool
    steps: Array  # products spent (batch,) int32
    dimension: Array  # dimensions added in all, a scalar int32


class ErrorTask(NamedTuple):
    """What `deqcore.linear.certified` asks of one Krylov space. Arrays are `(batch,)`, those of floats wide."""

    rule: tuple[float, ...]  # a `deqcore.linear.rules.Rule`
    target: float  # largest relative residual and estimated relative error
    max_vjps: int  # of all spaces of a sample
    rounding: float  # relative residual that rounding may hide of A u, for a column and a u of norm 1
    estimate: InverseJacobian | None  # the witness
    norm: Array  # of the cotangent
    goal: Array  # residual at which a sample is judged
    vjps: Array  # spent before (int32)
    size: Array  # norm of the solution before
    residual: Array  # relative, before
    error: Array  # estimated, relative, before
    met: Array  # bool


class ErrorJudged(NamedTuple):
    """The space that `FusedKernels.certify` has grown, its solution, and the figures of `ErrorTask` after it."""

    space: Krylov
    x: Array  # (batch, n)
    residual: Array
    error: Array
    met: Array
    unverified: Array  # bool: the rounding of A u hides the residual


class Joining(NamedTuple):
    """Samples that begin their Krylov space again, while that of others grows."""

    rows: Any  # which they are `(batch,)`, a NumPy array of bool
    vectors: Array  # that the spaces begin with, in these rows `(batch, n)`
    norms: Any  # of the vectors `(batch,)`, a NumPy array


NextJoining: TypeAlias = Callable[[], Joining | None]


class FusedKernels:
    """The fused kernels of a backend. Every method returns None where it has no kernel for these arrays.

    A backend without any has `Backend.kernels = None`. To rounding, a kernel gives the result of the operations that it
    replaces, on the same state, so that histories, estimates and continued solves do not depend on which of them ran.
    Whether it runs must not depend on the values of any sample.

    Example:
        >>> import deqcore
        >>> deqcore.get_backend(backend="numpy").kernels is None
        True
    """

    def __init__(self, be: ArrayOps) -> None:
        """Make the part of the backend `be`."""
        self.be = be

    def first_figures(self, z0: Array, fz: Array, limits: Limits) -> dict[str, Any] | None:
        """Return what `deqcore.solve.loop.first_figures` gives for z0 and f(z0), as NumPy arrays."""
        return None

    def step(self, solver: object, f: Map, z: Array, fz: Array, state: Any) -> StepResult | None:
        """Return `solver.step(backend, f, z, fz, state)`; `state` is the solver's own."""
        return None

    def update(
        self, before: LoopState, result: StepResult, residual: Array, size: Array | None, limits: Limits
    ) -> LoopState | None:
        """Update the loop state after a step.

        Args:
            before: the loop state before the step.
            result: the result of the step.
            residual: ‖f(z) − z‖ `(batch,)`.
            size: ‖f(z)‖ `(batch,)`, or None if it is unknown and `limits.rtol` is 0.
            limits: the numbers of the verdict, which is `deqcore.solve.termination.verdict`.

        Returns:
            The loop state after the step, but with the solver's state from before it.
        """
        return None

    def arnoldi(self, space: Krylov, w: Array, goal: Array, twice: bool, shifted: bool = False) -> Krylov | None:
        """Do the part of a GMRES step after the product.

        Args:
            space: the Krylov space.
            w: the product with its latest vector, `(batch, n)`.
            goal: residual at which a sample is done `(batch,)`.
            twice: project again where products cancel, see `deqcore.linear.norms.orthogonalize`.
            shifted: A = I − J, and `w` is the product with J.

        Returns:
            The space with one more dimension.
        """
        return None

    def grow(
        self,
        space: Krylov,
        image: Map,
        goal: Array,
        steps: int,
        *,
        twice: bool,
        shifted: bool,
        together: bool,
        joining: NextJoining | None = None,
    ) -> Krylov | None:
        """Do all of `deqcore.linear.gmres.KrylovSpace.grow`, where each of its decisions is known on the host.

        Args:
            space: the Krylov space, which stays what it is.
            image: the product with a basis vector `(batch, n)`.
            goal: residual at which a sample is done `(batch,)`.
            steps: dimensions to add at most.
            twice: project again where products cancel, see `deqcore.linear.norms.orthogonalize`.
            shifted: A = I − J, and `image` is the product with J.
            together: end as soon as one of the samples that were asked to grow is done.
            joining: asked before each product. What the samples of its answer had in `space` is lost. A kernel need not
                ask.

        Returns:
            The space with more dimensions.
        """
        return None

    def plain_step(self, x: Array, r: Array, image: Array, norm: Any, rows: Any) -> Any | None:
        """Add r to x in place, in the rows of the mask `rows` whose `image` is shorter than `norm`.

        Args:
            x: `(batch, n)`, which the caller owns.
            r: `(batch, n)`.
            image: `(batch, n)`.
            norm: `(batch,)`, a NumPy array in the wide dtype.
            rows: `(batch,)`, a NumPy array of bool.

        Returns:
            ‖image‖ of these rows and `norm` of the others, a NumPy array.
        """
        return None

    def certify(self, space: Krylov, image: Map, task: ErrorTask) -> ErrorJudged | None:
        """Do all rounds of `deqcore.linear.certified` with one space, where each of its decisions is known on the host.

        Args:
            space: a space that has not grown, without a preconditioner, of A = I − J; it stays what it is.
            image: the product of J with a basis vector `(batch, n)`. Vectors are projected again where products cancel.
            task: what is asked.
        """
        return None

    def secants(
        self, basis: History, gram: History, pairs: History, whole: Callable[[], InverseJacobian]
    ) -> InverseJacobian | None:
        """Make the multi-secant estimate of Broyden's pairs.

        Args:
            basis: residuals.
            gram: rows of the lower triangle of their Gram matrix, with half of its diagonal.
            pairs: coefficients of each step, and of each difference of residuals.
            whole: makes `deqcore.linear.lowrank.MultisecantInverse`.

        Returns:
            An estimate with the same products.
        """
        return None

    def low_rank(self, basis: History, left: History, right: History, v: Array) -> Array | None:
        """Return v + Q Σ_j r_j (l_jᵀ Qᵀ v), which reads each sample's vectors twice in a row.

        Args:
            basis: Q, vectors of n numbers.
            left: the l_j, coefficients with respect to Q.
            right: the r_j, in step with `left`.
            v: `(batch, n)`.

        Returns:
            `(batch, n)`.
        """
        return None

    def least_squares(self, space: Krylov, inverse: Array | bool) -> tuple[Array, ...] | None:
        """Solve the small system of a Krylov space.

        Args:
            space: the Krylov space.
            inverse: whether the norm of the inverse is wanted, for all or for each sample `(batch,)`.

        Returns:
            The fields of `deqcore.linear.gmres.LeastSquares`, for a right-hand side of norm 1.
        """
        return None

    def residual_norms(self, z: Array, fz: Array) -> tuple[Array, Array] | None:
        """Return what `deqcore.linear.norms.residual_norms` returns."""
        return None

    def orthogonalize(self, basis: History, w: Array, twice: bool) -> tuple[Array, Array, Array, Array] | None:
        """Return what `deqcore.linear.norms.orthogonalize` returns."""
        return None
