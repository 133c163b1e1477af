"""What a backend gets to find gradients with: a strategy, bound to the solver and the settings of one call."""

from __future__ import annotations

from abc import ABC, abstractmethod

from deqcore.types import AdjointReport, Array, Map, PassInputs


class AdjointSolver(ABC):
    """Finds `u ≈ (I − J)^-T g`: what `Autodiff.implicit` calls in the backward pass.

    It also does what `backward.on_failure` and `backward.verify_every` say. Two of them compare equal, and have one
    hash, if compiled code that was traced with one serves for the other.

    Attributes:
        exact: whether the result is a true derivative, which forward mode and second derivatives require.
        name: of the strategy's class, for messages.
        uses_vjp: whether a call may use `vjp`; if not, the graph of z need not be recorded.
        uses_state: whether the solver's state must be kept for the backward pass.
        remembers: whether the strategy has a state and this call keeps it, so that a pass needs `PassInputs`.
        calls_host: whether a call in compiled code may call the host, for a warning, an error or a measurement.

    Example:
        >>> import numpy as np, deqcore
        >>> from deqcore.backward.jacobian_free import JacobianFree
        >>> from deqcore.solve.adjoint import Adjoint
        >>> from deqcore.solvers.picard import Picard
        >>> adjoint: AdjointSolver = Adjoint(deqcore.get_backend(backend="numpy"), JacobianFree(), Picard())
        >>> adjoint.name, adjoint.exact, adjoint.uses_vjp
        ('JacobianFree', False, False)
        >>> adjoint(None, np.ones((1, 2)), ())[0].tolist()
        [[1.0, 1.0]]
    """

    @property
    @abstractmethod
    def exact(self) -> bool:
        """Whether the result is a true derivative."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the strategy's class."""

    @property
    @abstractmethod
    def uses_vjp(self) -> bool:
        """Whether a call may use `vjp`."""

    @abstractmethod
    def next_uses_vjp(self) -> bool:
        """Return whether the pass of this call may use `vjp`: a strategy's state may know that it does not."""

    @property
    @abstractmethod
    def uses_state(self) -> bool:
        """Whether a call reads the solver's state."""

    @property
    @abstractmethod
    def remembers(self) -> bool:
        """Whether a pass needs `PassInputs`."""

    @property
    @abstractmethod
    def calls_host(self) -> bool:
        """Whether a call in compiled code may call the host."""

    @abstractmethod
    def __call__(
        self, vjp: Map, g: Array, state: object, turn: Array | None = None, inputs: PassInputs | None = None
    ) -> tuple[Array, AdjointReport]:
        """Find u for the cotangent g.

        Args:
            vjp: `u ↦ Jᵀu` at z*, `(batch, n)` to `(batch, n)`.
            g: cotangent of z*, `(batch, n)`.
            state: the solver's state at the end of the forward solve.
            turn: what `turn` returned for this call, traced or not; None where calls run code of an earlier one.
            inputs: for a strategy with state, which is read from the call's `StrategyState` and written to it;
                `values` is ignored. None: it is called as one without state.

        Returns:
            u `(batch, n)`, and what it took.

        Raises:
            ConvergenceError: `backward.on_failure` is "raise" and a sample failed (outside of compiled code).
        """

    @abstractmethod
    def advance(
        self, vjp: Map, g: Array, state: object, turn: Array | None, inputs: PassInputs
    ) -> tuple[Array, AdjointReport, Array]:
        """Find u as a call does, with the strategy's state as a value that goes in and out, as traced code needs it.

        Args:
            vjp: as in a call.
            g: as in a call.
            state: as in a call.
            turn: as in a call.
            inputs: the state, and what is known of the forward solve.

        Returns:
            u `(batch, n)`, what it took, and the new state `(m,)`.
        """

    @abstractmethod
    def transposed(self) -> AdjointSolver:
        """Return the same strategy for x = b + J x, called with `v ↦ J v`: forward mode, second derivatives."""

    @abstractmethod
    def compiled(self, *, staged: bool, observed: bool = False) -> AdjointSolver:
        """Return the solver that a tracing backend compiles.

        The user's code (`staged`) gets callbacks, and measurements that end in one, only if a setting asks for them.

        Args:
            staged: the user compiles (`jit`), so that the program runs without Python.
            observed: the report leaves the program as data, so that measurements are worth their products.
        """

    @abstractmethod
    def turn(self) -> int:
        """Count a call, and decide whether its report is verified.

        Returns:
            A number for the choice of what is measured, or −1 to measure nothing.
        """
