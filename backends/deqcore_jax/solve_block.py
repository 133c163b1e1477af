"""Blocks that hand a value to the one solve that runs inside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

from deqcore.errors import StrategyError
from deqcore_jax.jit_context import key

T = TypeVar("T")


class _Slot(Generic[T]):
    """The value of a block, and whether a solve has taken it."""

    def __init__(self, value: T) -> None:
        self.value = value
        self.taken = False


class SolveBlock(Generic[T]):
    """One kind of block.

    Args:
        name: of the context variable.
        second: the error of a second solve inside one block.
    """

    def __init__(self, name: str, second: str) -> None:
        self._open: ContextVar[_Slot[T] | None] = ContextVar(name, default=None)
        self._second = second

    @contextmanager
    def holding(self, value: T | None) -> Iterator[None]:
        """Enter a block that hands over `value`; None: one that hands over nothing."""
        slot = None if value is None else _Slot(value)
        token = self._open.set(slot)
        try:
            with key(slot):  # a function compiled inside the block holds the value, so no other block may reuse it
                yield
        finally:
            self._open.reset(token)

    def take(self) -> T | None:
        """Return the value of the block for the solve that starts now, None outside of a block.

        Raises:
            StrategyError: a solve has taken it.
        """
        slot = self._open.get()
        if slot is None:
            return None
        if slot.taken:
            raise StrategyError(self._second)
        slot.taken = True
        return slot.value
