"""Arithmetic with one number for each sample."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from deqcore.abc.backend import Backend
from deqcore.types import Array

T = TypeVar("T")


@dataclass(frozen=True)
class Figures:
    """Arrays `(batch,)` in the form in which decisions are cheapest: NumPy's where reading them costs no wait.

    A dozen operations on them cost a fifth as much there as with a framework's own. Elsewhere, and in traced code, they
    stay the backend's, and `read` and `given` do nothing.
    """

    backend: Backend
    on_host: bool

    @classmethod
    def of(cls, backend: Backend, like: Array) -> Figures:
        """Choose by `like` `(batch,)`."""
        return cls(backend, backend.host.numpy_view(like) is not None)

    @property
    def xp(self) -> Any:
        """The namespace of the figures' operations."""
        return np if self.on_host else self.backend.xp

    def read(self, x: Array) -> Array:
        """Return the backend's array in the figures' form."""
        if not self.on_host:
            return x
        view = self.backend.host.numpy_view(x)
        return x if view is None else view

    def given(self, x: Array) -> Array:
        """Return figures as the backend's array."""
        return self.backend.host.from_numpy_view(x) if self.on_host else x

    def when(self, wanted: Array, body: Callable[[T], T], carry: T) -> T:
        """Apply `body` if any of the `wanted` figures holds."""
        if self.on_host:
            return body(carry) if np.count_nonzero(wanted) else carry
        return self.backend.cond(wanted, body, carry)

    def errstate(self) -> AbstractContextManager[object]:
        """Silence NumPy's warnings: figures may be NaN or inf."""
        return np.errstate(all="ignore") if self.on_host else nullcontext()
