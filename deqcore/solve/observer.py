"""Observers of solves: one ContextVar, read once per call of `fixed_point` or `vjp` and never inside a loop.

The monitor is an observer. Without an observer a solve pays one look-up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from deqcore.abc.backend import Backend
from deqcore.config import Config
from deqcore.solution import Solution
from deqcore.types import Tree


class Solve(NamedTuple):
    """One solve, as an observer receives it.

    Attributes:
        solution: the solution that the user gets; its record, if any, is filled when the backward pass runs.
        config: the settings of the solve.
        seconds: host time from the start of the solve to its return; a device may still be at work.
        f: the user's function `f(z, *args)`.
        z0: the initial iterate.
        args: the further arguments of f.
    """

    solution: Solution
    config: Config
    seconds: float
    f: Callable[..., Tree]
    z0: Tree
    args: tuple[Any, ...]


class Observer(ABC):
    """An observer receives every solve inside its block, and may change the settings of the next ones."""

    @abstractmethod
    def adjust(self, config: Config, backend: Backend) -> Config:
        """Return the settings to use instead of `config`, the resolved settings of the call."""

    @abstractmethod
    def solved(self, solve: Solve) -> None:
        """Receive a solve that has returned, before a failure to converge is reported. Must not wait for a device."""


_observer: ContextVar[Observer | None] = ContextVar("deqcore.solve.observer", default=None)


def observer() -> Observer | None:
    """Return the observer of this thread or task, if there is one."""
    return _observer.get()


@contextmanager
def observing(watcher: Observer | None) -> Iterator[None]:
    """Pass every solve inside the block to `watcher`, in this thread or task only; None switches observers off."""
    token = _observer.set(watcher)
    try:
        yield
    finally:
        _observer.reset(token)
