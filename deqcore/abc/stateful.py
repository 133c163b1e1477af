"""The contract of a backward strategy that learns from one backward pass for the next."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from deqcore.abc.backend import Backend
from deqcore.abc.backward import Strategy
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.types import AdjointReport, Array, Map, PassInputs


class StatefulStrategy(Strategy):
    """A strategy that keeps numbers from one backward pass to the next, such as what an audit has found.

    The state is one vector of float32, so that every framework can store, copy and broadcast it: a buffer in PyTorch,
    an argument in JAX. There a state that several solves share comes back as the sum of their next ones, and devices
    may average it: a strategy must recognise both. `solve_adjoint` is the strategy for a caller that keeps no state,
    and must be right by itself.

    Example:
        >>> import numpy as np, deqcore
        >>> from deqcore.abc.backward import report
        >>> class Counting(StatefulStrategy):
        ...     needs = "vjp"
        ...     def init_state(self):
        ...         return (0.0,)
        ...     def solve_adjoint(self, backend, vjp, g, estimate):
        ...         return g + vjp(g), report(backend, g, vjps=1)
        ...     def solve_with_state(self, backend, vjp, g, estimate, inputs):
        ...         return *self.solve_adjoint(backend, vjp, g, estimate), inputs.values + 1
        >>> be, g = deqcore.get_backend(backend="numpy"), np.ones((1, 2))
        >>> inputs = PassInputs(np.zeros(1, np.float32), np.array([True]), np.zeros(1), None)
        >>> Counting().solve_with_state(be, lambda v: 0.5 * v, g, None, inputs)[2].tolist()
        [1.0]
    """

    @abstractmethod
    def init_state(self) -> Sequence[float]:
        """Return the state before the first pass. Its length must depend on the options alone."""

    def next_uses_vjp(self, values: Array) -> bool:
        """Return whether the next pass may call `vjp`, from the state as NumPy reads it, before f is recorded.

        Where it returns False a framework with a tape records f without z, which saves a vjp in each pass. The state
        may change before the pass (two losses, gradient accumulation): then `PassInputs.products` is False.
        """
        return self.uses_vjp()

    @abstractmethod
    def solve_with_state(
        self, backend: Backend, vjp: Map, g: Array, estimate: InverseJacobian | None, inputs: PassInputs
    ) -> tuple[Array, AdjointReport, Array]:
        """Return `u ≈ (I − J)^-T g`, a report, and the state for the next pass `(m,)` of float32.

        The number of vjps must depend only on the state and on what the pass measures, so that compiled code serves
        for every state. A state that is not finite counts as `init_state`.

        Args:
            backend: the backend of these arrays.
            vjp: `u ↦ Jᵀu` at z*, `(batch, n)` to `(batch, n)`.
            g: cotangent of z*, `(batch, n)`.
            estimate: H ≈ (J − I)^-1 from the forward solve, or None.
            inputs: the state, and what is known of the forward solve.
        """
