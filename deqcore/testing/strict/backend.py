"""The strict backend: the registered NumPy backend behind arrays, histories and loops that refuse."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, ClassVar, Final

import numpy as np

from deqcore import plugins
from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.arrays import ArrayOps
from deqcore.abc.autodiff import Autodiff
from deqcore.abc.backend import Backend
from deqcore.abc.guards import CallGuards
from deqcore.abc.history import History
from deqcore.abc.linalg import SmallLinalg
from deqcore.abc.numbers import NumberOps
from deqcore.testing.strict.array import StrictArray, StrictError, unwrap, wrap
from deqcore.testing.strict.carry import check_same
from deqcore.testing.strict.history import StrictHistory
from deqcore.testing.strict.namespace import XP
from deqcore.types import Array, BackwardRecord, Capabilities, LoopVars, Map, SolveResult

_traced: Final[ContextVar[bool]] = ContextVar("traced", default=False)
"""Whether the code that runs is a step of a loop, whose body was traced before."""


class StrictLinalg(SmallLinalg):
    """NumPy's, on what is hidden."""

    def __init__(self, be: StrictBackend) -> None:
        super().__init__(be)
        self.numpy = be.numpy

    def solve(self, a: Array, b: Array) -> Array:
        return wrap(self.numpy.linalg.solve(unwrap(a), unwrap(b)))

    def solve_positive(self, a: Array, b: Array) -> Array:
        """Give NaN where a factorization without pivots, as backends may use, ends at a pivot below 0."""
        systems, x = unwrap(a), unwrap(self.solve(a, b))
        sound = np.isfinite(systems).all(axis=(1, 2))
        least = np.linalg.eigvalsh(np.where(sound[:, None, None], systems, np.eye(systems.shape[1]))).min(axis=1)
        return wrap(np.where((least > 0).reshape(-1, *[1] * (x.ndim - 1)), x, np.full_like(x, np.nan)))


class StrictAutodiff(Autodiff):
    """NumPy's, on what is hidden."""

    def __init__(self, be: StrictBackend) -> None:
        super().__init__(be)
        self.numpy = be.numpy

    def linearize(self, f: Map, z: Array) -> tuple[Array, Map]:
        value, vjp = self.numpy.autodiff.linearize(lambda x: unwrap(f(wrap(x))), unwrap(z))
        return wrap(value), lambda u: wrap(vjp(unwrap(u)))

    def jvp(self, f: Map, z: Array) -> Map | None:
        product = self.numpy.autodiff.jvp(lambda x: unwrap(f(wrap(x))), unwrap(z))
        return None if product is None else lambda v: wrap(product(unwrap(v)))

    def forward_only(
        self, f: Callable[..., Array], z0: Array, args: tuple[Any, ...], solve: Callable[[Map, Array], SolveResult]
    ) -> SolveResult:
        with self.be.errstate():
            return solve(lambda z: f(z, *args), z0)

    def implicit(
        self,
        f: Callable[..., Array],
        z0: Array,
        args: tuple[Any, ...],
        solve: Callable[[Map, Array], SolveResult],
        adjoint: AdjointSolver,
    ) -> tuple[Array, SolveResult, BackwardRecord | None]:
        forward = self.forward_only(f, z0, args, solve)
        return forward.z, forward, None

    def grad_enabled(self) -> bool:
        return False

    def vjp(
        self, value: Callable[..., tuple[Array, Any]], args: tuple[Any, ...], cotangent: Array
    ) -> tuple[Array, Any, tuple[Any, ...]]:
        def hidden(*moved: Any) -> tuple[Any, Any]:
            result, aux = value(*_mapped(self.be, moved, wrap))
            return unwrap(result), aux

        result, aux, gradients = self.numpy.autodiff.vjp(hidden, _mapped(self.be, args, unwrap), unwrap(cotangent))
        return wrap(result), aux, _mapped(self.be, gradients, wrap)


class StrictNumbers(NumberOps):
    """NumPy's, on what is hidden."""

    def __init__(self, be: StrictBackend) -> None:
        super().__init__(be)
        self.numpy = be.numpy

    def power_of_two(self, x: Array) -> Array:
        return wrap(self.numpy.numbers.power_of_two(unwrap(x)))

    def to_pairs(self, x: Array) -> Array:
        return wrap(self.numpy.numbers.to_pairs(unwrap(x)))

    def from_pairs(self, x: Array) -> Array:
        return wrap(self.numpy.numbers.from_pairs(unwrap(x)))


class StrictGuards(CallGuards):
    """NumPy's, as far as a tracing framework has one."""

    def __init__(self, be: StrictBackend) -> None:
        super().__init__(be)
        self.numpy = be.numpy

    def in_extended_precision(self) -> bool:
        return self.numpy.guards.in_extended_precision()


class StrictBackend(Backend):
    """NumPy with the manners of a tracing framework."""

    name: ClassVar[str] = "strict"
    xp = XP
    linalg_class = StrictLinalg
    autodiff_class = StrictAutodiff
    numbers_class = StrictNumbers
    guards_class = StrictGuards

    def __init__(self) -> None:
        self.numpy: Backend = plugins.make_backend("numpy")
        self.capabilities: Capabilities = replace(self.numpy.capabilities, autodiff=False, nested_loops=True)
        super().__init__()

    def is_array(self, leaf: object) -> bool:
        return isinstance(leaf, StrictArray)

    def asarray(self, a: object, *, dtype: str | None = None, like: Array | None = None) -> Array:
        return wrap(self.numpy.asarray(unwrap(a), dtype=dtype, like=unwrap(like)))

    def to_numpy(self, x: Array) -> Any:
        return np.array(unwrap(x))

    def is_traced(self, *leaves: Any) -> bool:
        return any(isinstance(leaf, StrictArray) for leaf in self.flatten(leaves)[0])

    def astype(self, x: Array, dtype: str) -> Array:
        return wrap(unwrap(x).astype(dtype))

    def to_accum_dtype(self, x: Array) -> Array:
        return wrap(self.numpy.to_accum_dtype(unwrap(x)))

    def cast(self, x: Array, like: Array) -> Array:
        return wrap(self.numpy.cast(unwrap(x), unwrap(like)))

    def norm(self, v: Array) -> Array:
        return wrap(self.numpy.norm(unwrap(v)))

    def inner(self, a: Array, b: Array) -> Array:
        return wrap(self.numpy.inner(unwrap(a), unwrap(b)))

    def select(self, mask: Array, new: Array, old: Array) -> Array:
        return wrap(self.numpy.select(unwrap(mask), unwrap(new), unwrap(old)))

    def known_all(self, mask: Array) -> bool:
        return False

    def history(self, like: Array, history_size: int, dtype: str | None = None) -> History:
        return StrictHistory(self.numpy.history(unwrap(like), history_size, dtype))

    def errstate(self) -> AbstractContextManager[object]:
        return self.numpy.errstate()

    def loop(
        self,
        running: Callable[[LoopVars], Array],
        body: Callable[[LoopVars], LoopVars],
        carry: LoopVars,
        steps: int | Array,
        check_every: int | str = "auto",
    ) -> LoopVars:
        """Trace the body once, whether it is needed or not, and hold every step to what came out.

        A loop inside a body was traced with that body, and is not traced again in its steps.
        """
        every = 1 if check_every == "auto" else int(check_every)
        with self.errstate():
            if not _traced.get():
                check_same(carry, body(carry))
            token = _traced.set(True)
            try:
                for step in range(int(unwrap(steps))):
                    if step % every == 0 and not _condition(running(carry)):
                        break
                    after = body(carry)
                    check_same(carry, after)
                    carry = after
            finally:
                _traced.reset(token)
        return carry

    def choose(
        self, wanted: Array, body: Callable[[Any], LoopVars], otherwise: Callable[[Any], LoopVars], carry: Any
    ) -> LoopVars:
        """Trace both branches, and hold them to one structure; a step of a loop, which was traced before, takes one."""
        if _traced.get():
            return body(carry) if _condition(XP.any(wanted)) else otherwise(carry)
        first, second = body(carry), otherwise(carry)
        check_same(first, second)
        return first if _condition(XP.any(wanted)) else second

    def detach(self, x: Array) -> Array:
        return x


def _mapped(be: ArrayOps, trees: Any, change: Callable[[Any], Any]) -> Any:
    leaves, structure = be.flatten(trees)
    return be.unflatten(structure, [change(leaf) for leaf in leaves])


def _condition(going: Any) -> bool:
    if not isinstance(going, StrictArray) or going.shape != () or going.dtype != bool:
        raise StrictError(
            f"A loop's condition must be one bool array without axes (got {going!r}). Use xp.any or xp.all."
        )
    return bool(going.hidden)
