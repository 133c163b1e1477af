"""The contract of a solver that another library runs from start to end: one call solves, and there are no steps.

An adapter is a frozen dataclass that puts such a solver behind `ExternalSolver`. `deqcore check solver NAME` then
judges it by `deqcore.testing.suite.external`. It also is a `Solver` whose one step solves, so that
`deqcore.fixed_point` can use it with any backward strategy that needs no estimate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.abc.solver import Solver
from deqcore.types import Array, Map, Tree

CLAIMS: Final[Mapping[str, str]] = {
    "status": "it says whether it has converged",
    "evaluations": "it counts the evaluations of f",
    "batch": "the first axis is a batch of independent problems",
    "gradient": "the solution can be differentiated",
    "second": "the gradient can be differentiated",
    "units": "its tolerance is relative, so that units do not matter",
}
"""What a library may claim. A claim that it does not make is not checked."""


class ExternalResult(NamedTuple):
    """What a library returns.

    Attributes:
        z: the solution, a tree like z0 of arrays with the batch first.
        converged: `(batch,)` of bool, or None if the library does not say.
        evaluations: of f, `(batch,)` int32 or one number for all samples, or None if the library does not count.
    """

    z: Tree
    converged: Array | None = None
    evaluations: Array | int | None = None


class ExternalState(NamedTuple):
    """The state of an external solver in a loop of deqcore.

    Attributes:
        evaluations: of f so far, `(batch,)` int32.
    """

    evaluations: Array


@dataclass(frozen=True)
class ExternalSolver(Solver):
    """A solver of another library: a frozen dataclass of its options.

    Attributes:
        backend: registered name of the backend whose arrays the library takes.
        packages: names of distributions whose versions a report gives.
        claims: keys of `CLAIMS`; what the library promises, and not what the adapter would like.
        best: options other than the defaults with which its authors would run it on small, smooth problems.
        rtol: tolerance on ‖f(z) − z‖ / ‖f(z)‖ in `deqcore.fixed_point`, translated by the adapter into the
            library's own rule.
        max_steps: budget of the library's own steps in `deqcore.fixed_point`.

    Example:
        >>> import numpy as np, deqcore
        >>> from deqcore.abc.external import ExternalResult, ExternalSolver
        >>> @dataclass(frozen=True)
        ... class Repeat(ExternalSolver):
        ...     backend = "numpy"
        ...     def solve(self, f, z0, args, *, rtol, max_steps):
        ...         for _ in range(max_steps):
        ...             z0 = f(z0, *args)
        ...         return ExternalResult(z0, evaluations=max_steps)
        >>> z, fz, state = Repeat(max_steps=60).step(
        ...     deqcore.get_backend(backend="numpy"), lambda z: 0.5 * z + 1.0, np.zeros((1, 1)), np.ones((1, 1)), None)
        >>> z.tolist(), state.evaluations.tolist()
        ([[2.0]], [61])
    """

    backend: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    claims: ClassVar[frozenset[str]] = frozenset()
    best: ClassVar[Mapping[str, object]] = {}

    rtol: float = 1e-6
    max_steps: int = 100

    @abstractmethod
    def solve(
        self, f: Callable[..., Array], z0: Array, args: tuple[Array, ...], *, rtol: float, max_steps: int
    ) -> ExternalResult:
        """Return the library's solution of z = f(z, *args).

        Args:
            f: from arrays `(batch, n)` to `(batch, n)`, row by row; a library of single problems may map it over rows.
            z0: initial iterate `(batch, n)`.
            args: arrays with the batch first, for which gradients may be asked; empty if f closes over its data, and
                then the whole batch is one problem.
            rtol: the largest ‖f(z) − z‖ / ‖f(z)‖ of a sample that has converged.
            max_steps: budget of the library's own steps.
        """

    def gradient(
        self, f: Callable[..., Array], z0: Array, args: tuple[Array, ...], g: Array, *, rtol: float, max_steps: int
    ) -> tuple[Array, ...]:
        """Return the gradients of ⟨g, z*⟩ for `args` by the library's own differentiation. Needs "gradient"."""
        raise NotImplementedError

    def second(
        self, f: Callable[..., Array], z0: Array, args: tuple[Array, ...], g: Array, *, rtol: float, max_steps: int
    ) -> Array:
        """Return the gradient of the sum of `gradient(…)[0]` for `args[0]`; or raise, if the library refuses."""
        raise NotImplementedError

    def init(self, backend: Backend, z: Array, fz: Array) -> ExternalState:
        """Return a count of zero."""
        return ExternalState(backend.xp.zeros_like(z[:, 0], dtype=backend.xp.int32))

    def step(self, backend: Backend, f: Map, z: Array, fz: Array, state: Any) -> tuple[Array, Array, ExternalState]:
        """Solve by the library from z; the one more evaluation is that of f at its solution."""
        result = self.solve(f, z, (), rtol=self.rtol, max_steps=self.max_steps)
        spent = self.max_steps if result.evaluations is None else result.evaluations
        before = self.init(backend, z, fz).evaluations if state is None else state.evaluations
        return result.z, f(result.z), ExternalState(before + spent + 1)

    def evaluations(self, backend: Backend, steps: Array, state: Any) -> Array:
        """Return those that the library counts, or its budget of steps where it does not."""
        return 1 + state.evaluations
