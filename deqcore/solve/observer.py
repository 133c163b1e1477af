"""Who watches the solves: one ContextVar, asked once per call of `fixed_point` or `vjp` and never inside a loop.

The monitor is an observer. Without one a solve pays one look-up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deqcore.abc.backend import Backend
from deqcore.types import Tree

if TYPE_CHECKING:
    from deqcore.config import Config
    from deqcore.solution import Solution


@dataclass(frozen=True)
class Solve:
    """One solve, as an observer sees it.

    Attributes:
        solution: what the user gets; its record, where there is one, is filled when the backward pass runs.
        config: the settings that it ran with.
        seconds: on the host, from the start of the solve to its return; a device may still be at work.
        f: the map, as it was given: `f(z, *args)`.
        z0: the initial state.
        args: its further arguments.
    """

    solution: Solution
    config: Config
    seconds: float
    f: Callable[..., Tree]
    z0: Tree
    args: tuple[Any, ...]


class Observer(ABC):
    """Sees every solve inside its block, and may change the settings of the next ones."""

    @abstractmethod
    def adjust(self, config: Config, backend: Backend) -> Config:
        """Return the settings to use in place of `config`, which is what the call resolved to."""

    @abstractmethod
    def solved(self, solve: Solve) -> None:
        """A solve has returned; called before a failure to converge is reported. It must not wait for a device."""


_observer: ContextVar[Observer | None] = ContextVar("deqcore.solve.observer", default=None)


def observer() -> Observer | None:
    """Return the observer of this thread or task, if there is one."""
    return _observer.get()


@contextmanager
def observing(watcher: Observer | None) -> Iterator[None]:
    """Let `watcher` see every solve inside the block, in this thread or task only; None: let nobody see them."""
    token = _observer.set(watcher)
    try:
        yield
    finally:
        _observer.reset(token)
