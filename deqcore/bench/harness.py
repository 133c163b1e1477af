"""What measuring needs of a framework, and what takes part in a comparison."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

import deqcore
from deqcore.abc.backend import Backend
from deqcore.bench.cases import Case
from deqcore.bench.machine import peak_memory
from deqcore.config import Config
from deqcore.errors import ProblemError, listing
from deqcore.testing.problem import rebuild
from deqcore.types import Array, Tree

Call = Callable[..., Any]


def same(fn: Call) -> Call:
    """Return the function as it is."""
    return fn


@dataclass(frozen=True)
class Harness:
    """A framework under measurement.

    Attributes:
        name: of the framework, as deqcore registers it.
        xp: its array namespace.
        asarray: from NumPy.
        to_numpy: to NumPy; waits for the device.
        jit: compiles a function, where the framework does that.
        jit_once: compiles one that is called a few times and not timed, sooner.
        block: waits until an array has been computed.
        quiet: context in which no gradient is recorded.
        traced: f runs inside compiled code, so its calls cannot be counted from outside.
        package: the framework's distribution, for reports.
        relative: ‖f(z) − z‖ / ‖f(z)‖ per sample in float64, from z and f(z); None: on the host.
        peak: bytes by which memory grew while a task ran; None where unknown.
        queued: evaluations of f in a row before one waits for them, when f alone is timed.
    """

    name: str
    xp: Any
    asarray: Callable[[Any], Array]
    to_numpy: Callable[[Array], Any]
    block: Callable[[Array], object]
    jit: Callable[[Call], Call] = same
    jit_once: Callable[[Call], Call] = same
    quiet: Callable[[], AbstractContextManager[Any]] = nullcontext
    traced: bool = False
    package: str | None = None
    relative: Callable[[Array, Array], Any] | None = None
    peak: Callable[[Callable[[], object]], int | None] = peak_memory
    queued: int = 1

    @classmethod
    def of(cls, backend: Backend, package: str | None) -> Harness:
        """Build the harness of a registered backend; `package` is the framework's module."""
        module: Any = import_module(package) if package else None
        traced = backend.capabilities.jit

        def block(value: Array) -> None:
            backend.harness.synchronize()
            backend.to_numpy(value)  # free of cost where arrays live on the host

        return cls(
            name=backend.name,
            xp=backend.xp,
            asarray=backend.asarray,
            to_numpy=backend.to_numpy,
            block=block,
            jit=module.jit if traced else same,
            jit_once=backend.harness.jit_once if traced else same,
            quiet=getattr(module, "no_grad", nullcontext),
            traced=traced,
            package=package,
        )

    def ready(self, case: Case) -> Ready:
        """Return the case in arrays of this framework."""
        problem = case.problem
        if isinstance(problem.f, Mapping):
            if self.name not in problem.f:
                raise ProblemError(
                    f"The problem {problem.name!r} is written for {listing(problem.f)}, not for {self.name!r}: choose "
                    f"another backend, or write it once with the array namespace."
                )
            own = problem.f[self.name]

            def f(z: Tree, params: Tree, inputs: Tree) -> Tree:
                return own(params, z, inputs)
        else:
            shared, xp = problem.f, self.xp

            def f(z: Tree, params: Tree, inputs: Tree) -> Tree:
                return shared(xp, params, z, inputs)

        params, inputs, z0 = (rebuild(tree, self.asarray) for tree in (problem.params, problem.inputs, problem.z0))
        return Ready(case, f, z0, params, inputs)


@dataclass(frozen=True)
class Ready:
    """A case in arrays of one framework: z* = f(z*, params, inputs).

    Attributes:
        calls: grows by one with each evaluation of f, if this is the counted version; the list's one number.
    """

    case: Case
    f: Callable[[Tree, Tree, Tree], Tree]
    z0: Array
    params: Tree
    inputs: Tree
    calls: list[int] = field(default_factory=lambda: [0])

    def counted(self) -> Ready:
        """Return the same with an f that counts its calls."""
        calls = [0]

        def f(z: Tree, params: Tree, inputs: Tree) -> Tree:
            calls[0] += 1
            return self.f(z, params, inputs)

        return replace(self, f=f, calls=calls)


class SolveOutcome(NamedTuple):
    """What one solve gave.

    Attributes:
        value: the state that the library returns.
        evaluations: of f for the slowest sample, as the library counts them; None where it does not.
    """

    value: Array
    evaluations: int | None = None


SolveFunction = Callable[[float], SolveOutcome]


class Contender(ABC):
    """A solver of some library.

    Attributes:
        library: the distribution's name.
        solver: the method, in the library's words.
        exact: whether the tolerance it is given is the one common norm; if not, it is searched for.
        recompiles: whether another tolerance compiles again, so that few are tried.
    """

    library: str
    solver: str
    exact: bool = False
    recompiles: bool = False

    @property
    def name(self) -> str:
        """Library and solver."""
        return f"{self.library} {self.solver}"

    @abstractmethod
    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        """Return a solve with everything bound that does not belong to its time.

        Args:
            harness: the framework.
            ready: what to solve.
            max_steps: budget in the library's own units.

        Returns:
            A function of the tolerance, in the library's own norm; 0 takes all the steps.
        """


class Deqcore(Contender):
    """One of deqcore's solvers, called as a user calls it."""

    library = "deqcore"
    exact = True

    def __init__(self, solver: str, label: str = "", compact: bool = False, **forward: object) -> None:
        """Take a registered solver's name, a label for tables, compaction, and further settings of `[forward]`."""
        self.solver = label or solver
        self.compact = compact
        self.settings = {"solver": solver, "on_failure": "ignore", **forward} | ({"compact": True} if compact else {})

    def prepare(self, harness: Harness, ready: Ready, max_steps: int) -> SolveFunction:
        """`fixed_point` without a gradient, compiled where the framework compiles."""
        config = Config(
            backend=harness.name,
            forward={**self.settings, "max_steps": max_steps},
            backward={"strategy": "jacobian-free"},
        )
        batched: dict[str, Any] = {"batched_args": (1,)} if self.compact else {}

        def solve(z0: Array, params: Tree, inputs: Tree, rtol: float | Array) -> tuple[Array, Array]:
            result = deqcore.fixed_point(ready.f, z0, params, inputs, config=config, forward__rtol=rtol, **batched)
            return result.value, result.evaluations

        compiled = harness.jit(solve)

        def run(rtol: float) -> SolveOutcome:
            with harness.quiet():
                value, evaluations = compiled(ready.z0, ready.params, ready.inputs, rtol)
            harness.block(value)
            return SolveOutcome(value, int(np.max(harness.to_numpy(evaluations), initial=0)))

        return run


def ours(solvers: Iterable[str], case: Case, traced: bool) -> list[Contender]:
    """Return the contenders of deqcore for a case; on an uneven one, with compaction too where code is eager."""
    compact = [True] if case.uneven and not traced else []
    return [
        Deqcore(name, f"{name} (compact)" if item else "", compact=item)
        for name in solvers
        for item in (False, *compact)
    ]


def residuals(harness: Harness, ready: Ready, value: Array) -> Any:
    """‖f(z) − z‖ / ‖f(z)‖ per sample, in float64, `(batch,)`: the one norm that all contenders are measured in."""
    with harness.quiet():
        image = ready.f(value, ready.params, ready.inputs)
        if harness.relative is not None:
            return harness.relative(value, image)
    z, fz = (np.asarray(harness.to_numpy(a), np.float64).reshape(len(a), -1) for a in (value, image))
    return np.linalg.norm(fz - z, axis=1) / np.maximum(np.linalg.norm(fz, axis=1), 1e-300)
