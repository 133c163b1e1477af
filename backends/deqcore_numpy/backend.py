"""The NumPy backend: the reference for the other backends, and an oracle for small problems.

It has no autodiff tape, see `autodiff.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from deqcore.abc.backend import Backend
from deqcore.abc.host import HostViews
from deqcore.abc.linalg import SmallLinalg
from deqcore.abc.numbers import NumberOps
from deqcore.abc.scaling import guarded_norm
from deqcore.errors import ConfigError
from deqcore.types import Capabilities
from deqcore_numpy.autodiff import NumpyAutodiff
from deqcore_numpy.complex_pairs import from_pairs, pairs
from deqcore_numpy.guards import NumpyGuards
from deqcore_numpy.history import NumpyHistory

ARRAYS: Final = (np.ndarray, np.generic)  # a union in the call would be built for each array


class NumpyLinalg(SmallLinalg):
    """By LAPACK, one system after the other where one of the batch is singular."""

    def solve(self, a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
        many = b if b.ndim == 3 else b[..., None]
        try:
            x = np.linalg.solve(a, many)
        except np.linalg.LinAlgError:
            x = np.stack([_solve_one(a[i], many[i]) for i in range(len(b))])
        return x if b.ndim == 3 else x[..., 0]


class NumpyHost(HostViews):
    """The arrays themselves."""

    def numpy_view(self, x: NDArray[Any]) -> NDArray[Any]:
        return x

    def from_numpy_view(self, x: NDArray[Any]) -> NDArray[Any]:
        return x


class NumpyNumbers(NumberOps):
    """Exponents by `frexp`, and views of complex numbers."""

    def power_of_two(self, x: NDArray[Any]) -> NDArray[Any]:
        power: NDArray[Any] = x / (2.0 * np.frexp(x)[0])
        return power

    def to_pairs(self, x: NDArray[Any]) -> NDArray[Any]:
        return pairs(x)

    def from_pairs(self, x: NDArray[Any]) -> NDArray[Any]:
        return from_pairs(x)


class NumpyBackend(Backend):
    """NumPy arrays on the host."""

    name: ClassVar[str] = "numpy"
    capabilities: Capabilities = Capabilities(autodiff=False, jvp=True, complex=True, compaction=True)
    xp = np
    linalg_class = NumpyLinalg
    autodiff_class = NumpyAutodiff
    numbers_class = NumpyNumbers
    guards_class = NumpyGuards
    host_class = NumpyHost

    def is_array(self, leaf: object) -> bool:
        return isinstance(leaf, ARRAYS)

    def asarray(self, a: object, *, dtype: str | None = None, like: NDArray[Any] | None = None) -> NDArray[Any]:
        return np.asarray(a, dtype or (like.dtype if like is not None else None))

    def to_numpy(self, x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(x)

    def astype(self, x: NDArray[Any], dtype: str) -> NDArray[Any]:
        return x.astype(dtype, copy=False)

    def to_accum_dtype(self, x: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(x).astype(np.float64, copy=False)

    def cast(self, x: NDArray[Any], like: NDArray[Any]) -> NDArray[Any]:
        return x.astype(like.dtype, copy=False)

    def norm(self, v: NDArray[Any]) -> NDArray[Any]:
        dtype = np.promote_types(v.dtype, np.float32)
        with np.errstate(all="ignore"):  # the guard handles squares that leave the range
            norms: NDArray[Any] = guarded_norm(self, v, np.linalg.norm(v.astype(dtype, copy=False), axis=1))
            return norms

    def put(self, x: NDArray[Any], rows: NDArray[Any], part: NDArray[Any]) -> NDArray[Any]:
        x = x.copy()
        x[rows] = part
        return x

    def errstate(self) -> AbstractContextManager[object]:
        return np.errstate(all="ignore")

    def history(self, like: NDArray[Any], history_size: int, dtype: str | None = None) -> NumpyHistory:
        if dtype not in (None, "float16", "float32", "float64"):
            raise ConfigError.bad_value("The solver", "history_dtype", dtype, "float16, float32 or float64 on numpy")
        if np.iscomplexobj(like):  # norms and dot products are real, so `derivative.pick` falls back to differences
            raise TypeError("A history holds real vectors, so a complex step cannot go through it.")
        batch, n = like.shape
        storage = np.zeros((batch, history_size, n), dtype or like.dtype)
        return NumpyHistory(storage, np.zeros((batch, history_size), bool), like.dtype)

    def detach(self, x: NDArray[Any]) -> NDArray[Any]:
        return x


def _solve_one(a: NDArray[Any], b: NDArray[Any]) -> NDArray[Any]:
    try:
        return np.linalg.solve(a, b)
    except np.linalg.LinAlgError:
        return np.full_like(b, np.nan)
