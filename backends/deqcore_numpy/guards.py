"""Guards of the calls of f on NumPy arrays, which f may write to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deqcore.abc.guards import CallGuards
from deqcore.errors import ProblemError
from deqcore.types import Tree
from deqcore_numpy.derivative import is_differencing
from deqcore_numpy.ownership import held


class NumpyGuards(CallGuards):
    """Read-only views, and copies of what others own."""

    def unfit(self, x: object) -> str | None:
        if type(x) is np.ndarray:
            return None
        if isinstance(x, np.matrix):
            return "a numpy.matrix, which is always two-dimensional: pass numpy.asarray of it"
        if isinstance(x, np.ma.MaskedArray):
            return "a masked array, whose masked entries have no value: pass its `filled(value)`, and the mask by args"
        return None

    def in_extended_precision(self) -> bool:
        return is_differencing()

    def owned(self, leaves: list[Tree]) -> list[Tree]:
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

    @contextmanager
    def keep_random_state(self, x: NDArray[Any]) -> Iterator[None]:
        before = np.random.get_state()
        try:
            yield
        finally:
            np.random.set_state(before)
