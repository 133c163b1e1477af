"""The contract of a solver. One method, one file: subclass `Solver` as a frozen dataclass of its options.

A solver iterates on matrices `(batch, n)` and is **written once** for all frameworks: pure functions, array
operations through `backend.xp`, histories through `backend.history`, and a state whose structure, shapes and dtypes
never change. Everything that all methods share (tolerances, freezing of samples that are done, the best iterate,
status, counters) belongs to the loop, see `deqcore.solve.loop`.

Example:
    A complete solver::

        @dataclass(frozen=True)
        class Picard(Solver):
            damping: float = 1.0

            def init(self, backend, z, fz):
                return ()

            def step(self, backend, f, z, fz, state):
                z = z + self.damping * (fz - z)
                return z, f(z), state
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from deqcore.abc.backend import Backend
from deqcore.abc.history import History
from deqcore.abc.inverse_jacobian import InverseJacobian
from deqcore.types import Array, Map


class Solver(ABC):
    """A fixed-point method for `z = f(z)`.

    Attributes:
        has_estimate: whether `inverse_jacobian` returns an estimate; checked before any solve.
        evaluations_per_step: how often `step` evaluates f. A method with a varying number overrides `evaluations`.
        needs: capabilities of the backend that it requires, such as "jvp".
        causal: whether a row's numbers depend on other rows through f alone, to the last bit. With `forward.batch = 2`
            and an f whose unit i reads units up to i only, no number of a unit then depends on a later one.
        cost_bounds: golden problems that it solves, also where plain iteration fails, each with an upper bound on the
            evaluations (and products) in float64, as in ``{"expansive": 20}``. The conformance suite checks these
            bounds, with the default options.

    Example:
        >>> import numpy as np, deqcore
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Half(Solver):
        ...     def init(self, backend, z, fz):
        ...         return ()
        ...     def step(self, backend, f, z, fz, state):
        ...         z = (z + fz) / 2
        ...         return z, f(z), state
        >>> be, f = deqcore.get_backend(backend="numpy"), lambda z: 0.2 * z + 1.0
        >>> z, fz, _ = Half().step(be, f, np.zeros((1, 1)), np.ones((1, 1)), ())
        >>> z.tolist(), fz.tolist()
        ([[0.5]], [[1.1]])
    """

    has_estimate: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    causal: ClassVar[bool] = False
    cost_bounds: ClassVar[Mapping[str, int]] = {}
    evaluations_per_step: ClassVar[int] = 1

    @abstractmethod
    def init(self, backend: Backend, z: Array, fz: Array) -> Any:
        """Return the state before the first step: a NamedTuple of arrays (leading axis: batch) and histories.

        Args:
            backend: the backend of these arrays.
            z: initial iterate `(batch, n)`.
            fz: `f(z)`, `(batch, n)`.
        """

    @abstractmethod
    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: Any) -> tuple[Array, Array, Any]:
        """Take one step: `(z, f(z), state) -> (z₊, f(z₊), state₊)`.

        Args:
            backend: the backend of these arrays.
            f: the map; a step calls it `evaluations_per_step` times.
            z: current iterate `(batch, n)`.
            fz: `f(z)`; a step never evaluates f at `z` again.
            state: as `init` or the previous step returned it.
        """

    def restarted(self, backend: Backend, rows: Array, z: Array, state: Any) -> Any:
        """Reset the samples `rows` to the state before a first step from `z`, with a residual of 0; others keep theirs.

        f was not finite at the result of the last step, so the loop moves these samples to another point, which it
        passes as z and as f(z). The next step must evaluate f at exactly this point and continue as from a start,
        without learning from the difference. The default takes `init` and erases all histories.

        Args:
            backend: the backend of these arrays.
            rows: `(batch,)` of bool.
            z: iterates `(batch, n)`.
            state: as the last step returned it; the samples are active in its histories.
        """
        fresh = self.init(backend, z, z)
        return _merged(backend, rows, fresh, state)

    def for_coupled_units(self) -> Solver:
        """Return the method for rows that f couples (`forward.batch = 2`), by default this one.

        Its steps must evaluate f once, at the point that they return or at one that they refuse: with several points
        in a step the rows would not be seen together. A method without such steps raises ConfigError.
        """
        return self

    def opening(self) -> OpeningSolver | None:
        """Return a method for the first steps without histories, or None.

        Traced code begins each solve with it, in a loop of its own that ends when a sample runs which it does not
        serve. Histories are allocated after that loop, and only if a sample is left: a loop that carries a history
        allocates it, and one whose steps may write to it copies vectors in each of them.
        """
        return None

    def started(self, backend: Backend, z: Array, state: Any) -> Array | None:
        """Return which samples are as after `init` now, if they were `restarted` at z one step ago `(batch,)`.

        A batch whose samples are replaced one by one (`deqcore.solve_stream`) begins a sample in this way: its
        histories are empty, `restarted` puts it at z, and one step evaluates f there. Then it gets the state of `init`,
        which is always right. A method that stores a vector in `init` says here where its state is right already, so
        that the vector stays in the slot of the latest step, and the sample has the whole ring before it. None:
        nowhere.

        Args:
            backend: the backend of these arrays.
            z: iterates `(batch, n)`.
            state: as the last step returned it.
        """
        return None

    def residual_norm(self, backend: Backend, state: Any) -> Array | None:
        """Return ‖f(z) − z‖ of the current iterate `(batch,)` if `step` has measured it, otherwise None."""
        return None

    def output_norm(self, backend: Backend, state: Any) -> Array | None:
        """Return ‖f(z)‖ of the current iterate `(batch,)` if `step` has measured it, otherwise None."""
        return None

    def inverse_jacobian(self, backend: Backend, state: Any) -> InverseJacobian | None:
        """Return the estimate H ≈ (∂(f − z)/∂z)^-1 from the solve, or None."""
        return None

    def secant_estimate(self, backend: Backend, state: Any) -> InverseJacobian | None:
        """Return an estimate that satisfies all secant pairs at once, H Y = S, to certify and refine gradients with.

        A method that updates recursively satisfies only its latest pair exactly. The default is `inverse_jacobian`.
        """
        return self.inverse_jacobian(backend, state)

    def chord(self, backend: Backend, z: Array, fz: Array, state: Any) -> Array | None:
        """Return the next iterate with H held fixed, z − H (f(z) − z) `(batch, n)`.

        Once the residual is rounding, `step` may divide rounding by rounding, and so does its derivative. Code that
        differentiates through steps then continues with this step, whose derivative converges at the rate of H.

        Returns:
            The iterate; by default f(z) for a method without an estimate. None means that `step` does not divide by a
            difference of iterates, so that it may be differentiated at any residual.
        """
        estimate = self.inverse_jacobian(backend, state)
        return fz if estimate is None else z - estimate.apply(fz - z)

    def evaluations(self, backend: Backend, steps: Array, state: Any) -> Array:
        """Return the evaluations of f per sample after `steps` `(batch,)` int32, including the first one."""
        return 1 + self.evaluations_per_step * steps


class OpeningSolver(Solver):
    """The first steps of another method, which are the same as its own for the samples that this one `serves`.

    Its state has no histories.
    """

    @abstractmethod
    def serves(self, backend: Backend, state: Any) -> Array:
        """Return the samples `(batch,)` of bool whose next step is that of the other method."""

    @abstractmethod
    def continued(self, backend: Backend, z: Array, fz: Array, state: Any) -> Any:
        """Return the state with which the other method continues, as if it had taken all steps.

        Args:
            backend: the backend of these arrays.
            z: current iterate `(batch, n)`.
            fz: `f(z)`, `(batch, n)`.
            state: as `init` or the last step of this method returned it.
        """


def detach_state(backend: Backend, state: Any) -> Any:
    """Return a solver state with the same numbers, without gradients."""
    return map_state(state, lambda leaf: leaf.detach() if isinstance(leaf, History) else backend.detach(leaf))


def _merged(backend: Backend, rows: Array, new: Any, old: Any) -> Any:
    """Return leaves of `new` in `rows`, of `old` elsewhere; histories are those of `old`, erased."""

    def leaf(new: Any, old: Any) -> Any:
        if isinstance(old, History):
            return old.erase(rows)
        return old if old is None or new is None or not old.ndim else backend.select(rows, new, old)

    return map_states(leaf, new, old)


def map_states(fn: Callable[..., Any], state: Any, *others: Any) -> Any:
    """Apply `fn` to the leaves, arrays, histories or None, in the same place of states of one structure."""
    if isinstance(state, tuple):
        parts = (map_states(fn, *leaves) for leaves in zip(state, *others, strict=True))
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return fn(state, *others)


def map_state(state: Any, fn: Callable[[Any], Any]) -> Any:
    """Apply `fn` to each leaf of a solver state that is not None."""
    return map_states(lambda leaf: None if leaf is None else fn(leaf), state)
