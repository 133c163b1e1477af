"""The NumPy backend: the reference for the other backends, and an oracle for small problems.

It has no autodiff tape. Jacobians are dense (complex step or central differences, see `derivative.py`), so
`deqcore.vjp` works for any NumPy function and costs one evaluation of f per element of the state and arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from deqcore.abc.adjoint import AdjointSolver
from deqcore.abc.backend import Backend
from deqcore.errors import ConfigError, ProblemError
from deqcore.solve.verification import coupled_rows
from deqcore.types import BackwardRecord, Capabilities, Map, SolveResult
from deqcore_numpy.derivative import (
    batched_jacobian,
    is_differencing,
    jacobian,
    product,
    vjp_back,
)
from deqcore_numpy.history import NumpyHistory
from deqcore_numpy.ownership import held


class NumpyBackend(Backend):
    """NumPy arrays on the host."""

    name: ClassVar[str] = "numpy"
    capabilities: Capabilities = Capabilities(autodiff=False, jvp=True, compaction=True)
    xp = np

    def is_array(self, leaf: object) -> bool:
        return isinstance(leaf, np.ndarray | np.generic)

    def unfit(self, x: Any) -> str | None:
        if type(x) is np.ndarray:
            return None
        if isinstance(x, np.matrix):
            return "a numpy.matrix, which is always two-dimensional: pass numpy.asarray of it"
        if isinstance(x, np.ma.MaskedArray):
            return "a masked array, whose masked entries have no value: pass its `filled(value)`, and the mask by args"
        return None

    def asarray(self, a: object, *, dtype: str | None = None, like: NDArray[Any] | None = None) -> NDArray[Any]:
        return np.asarray(a, dtype or (like.dtype if like is not None else None))

    def to_numpy(self, x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(x)

    def in_extended_precision(self) -> bool:
        return is_differencing()

    def owned(self, leaves: list[Any]) -> list[Any]:
        return [np.copy(leaves[0])] if isinstance(leaves[0], np.ndarray) and held(leaves) else leaves

    def unshared(self, x: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        return np.copy(x) if np.may_share_memory(x, other) else x

    @contextmanager
    def guard_inplace(self, z: NDArray[Any]) -> Iterator[Any]:
        seen = z.view()
        seen.flags.writeable = False  # f's views of it are read-only, too; z itself keeps its flags
        try:
            yield seen
        except ValueError as error:
            if "read-only" in str(error):
                raise ProblemError.in_place() from error
            raise

    def astype(self, x: NDArray[Any], dtype: str) -> NDArray[Any]:
        return x.astype(dtype, copy=False)

    def to_accum_dtype(self, x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(x).astype(np.float64, copy=False)

    def cast(self, x: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
        return x.astype(like.dtype, copy=False)

    def norm(self, v: NDArray[Any]) -> NDArray[Any]:
        dtype = np.promote_types(v.dtype, np.float32)
        with np.errstate(all="ignore"):  # the guard handles squares that leave the range
            norms: NDArray[Any] = self.guarded(v, np.linalg.norm(v.astype(dtype, copy=False), axis=1))
            return norms

    def power_of_two(self, x: NDArray[Any]) -> NDArray[Any]:
        power: NDArray[Any] = x / (2.0 * np.frexp(x)[0])
        return power

    def put(self, x: NDArray[Any], rows: NDArray[Any], part: NDArray[Any]) -> NDArray[Any]:
        x = x.copy()
        x[rows] = part
        return x

    @contextmanager
    def keep_random_state(self, x: NDArray[Any]) -> Iterator[None]:
        before = np.random.get_state()
        try:
            yield
        finally:
            np.random.set_state(before)

    def errstate(self) -> AbstractContextManager[object]:
        return np.errstate(all="ignore")

    def numpy_view(self, x: NDArray[Any]) -> NDArray[Any]:
        return x

    def from_numpy_view(self, x: NDArray[Any]) -> NDArray[Any]:
        return x

    def solve(self, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        many = b if b.ndim == 3 else b[..., None]
        try:
            x = np.linalg.solve(a, many)
        except np.linalg.LinAlgError:
            x = np.stack([_solve_one(a[i], many[i]) for i in range(len(b))])
        return x if b.ndim == 3 else x[..., 0]

    def history(self, like: NDArray[Any], history_size: int, dtype: str | None = None) -> NumpyHistory:
        if dtype not in (None, "float16", "float32", "float64"):
            raise ConfigError.bad_value("The solver", "history_dtype", dtype, "float16, float32 or float64 on numpy")
        if np.iscomplexobj(like):  # norms and dot products are real, so `derivative.pick` falls back to differences
            raise TypeError("A history holds real vectors, so a complex step cannot go through it.")
        batch, n = like.shape
        storage = np.zeros((batch, history_size, n), dtype or like.dtype)
        return NumpyHistory(storage, np.zeros((batch, history_size), bool), like.dtype)

    def linearize(self, f: Map, z: NDArray[Any]) -> tuple[Any, Map]:
        if coupled_rows(self, f, z) is None:
            blocks = batched_jacobian(f, z)

            def vjp(u: NDArray[Any]) -> NDArray[Any]:
                product: NDArray[Any] = np.einsum("bij,bi->bj", blocks, u).astype(u.dtype, copy=False)
                return product
        else:
            dense = jacobian(f, z, state=True)

            def vjp(u: NDArray[Any]) -> NDArray[Any]:
                product: NDArray[Any] = (np.ravel(u) @ dense).reshape(u.shape)
                return product.astype(u.dtype, copy=False)

        return f(z), vjp

    def jvp(self, f: Map, z: NDArray[Any]) -> Map:
        multiply = product(f, z, lambda: coupled_rows(self, f, z) is None)
        return lambda v: multiply(v).astype(v.dtype, copy=False)

    def forward_only(
        self, f: Callable[..., Any], z0: NDArray[Any], args: tuple[Any, ...], solve: Callable[[Map, Any], SolveResult]
    ) -> SolveResult:
        with self.errstate():
            return solve(lambda z: f(z, *args), z0)

    def implicit(
        self,
        f: Callable[..., Any],
        z0: Any,
        args: tuple[Any, ...],
        solve: Callable[[Map, Any], SolveResult],
        adjoint: AdjointSolver,
    ) -> tuple[Any, SolveResult, BackwardRecord | None]:
        forward = self.forward_only(f, z0, args, solve)
        return forward.z, forward, None

    def detach(self, x: NDArray[Any]) -> NDArray[Any]:
        return x

    def grad_enabled(self) -> bool:
        return False

    def vjp(
        self, value: Callable[..., tuple[Any, Any]], args: tuple[Any, ...], cotangent: Any
    ) -> tuple[Any, Any, tuple[Any, ...]]:
        leaves, structure = self.flatten(args)
        with self.errstate():
            primal, aux = value(*args)
        gradients: list[Any] = []
        for i, leaf in enumerate(leaves):
            if not self.is_array(leaf) or not np.issubdtype(leaf.dtype, np.floating):
                gradients.append(None)
                continue

            def moved(x: NDArray[Any], i: int = i) -> NDArray[Any]:
                changed = [*leaves[:i], x, *leaves[i + 1 :]]
                primal: NDArray[Any] = value(*self.unflatten(structure, changed))[0]
                return primal

            with self.errstate():
                gradients.append(vjp_back(jacobian(moved, leaf), cotangent, primal, leaf).astype(leaf.dtype))
        return primal, aux, self.unflatten(structure, gradients)


def _solve_one(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    try:
        return np.linalg.solve(a, b)
    except np.linalg.LinAlgError:
        return np.full_like(b, np.nan)
