"""Counts of backward passes for each layer or function, so that checks and warnings are rare in long programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from types import CodeType
from typing import Any, Final
from weakref import WeakKeyDictionary, ref

MOST: Final = 256  # shapes of one function that are counted apart


class Ledger:
    """What is known of one layer or function.

    Attributes:
        passes: backward passes that ran.
        failed: of these, passes whose failure was reported.
        coupled: of these, passes that were reported to couple rows.
        forward: solves that were reported to couple rows.
        unsolved: solves whose failure was reported.
        uneven: solves without a gradient whose samples stopped at different steps.
        suspect: whether the latest verification contradicted the strategy, so that the next pass is verified as well.
        verified: whether a pass has been verified; only traced code, which cannot know that a pass will run, needs it.
    """

    passes: int = 0
    failed: int = 0
    coupled: int = 0
    forward: int = 0
    unsolved: int = 0
    uneven: int = 0
    suspect: bool = False
    verified: bool = False

    def count(self) -> int:
        """Count a pass; the number of those before it."""
        self.passes += 1
        return self.passes - 1


_ledgers: WeakKeyDictionary[Any, dict[Hashable, Ledger]] = WeakKeyDictionary()


def ledger(subject: Any, key: Hashable) -> Ledger:
    """Return the ledger of a subject, as `subject_of` returns it.

    Args:
        subject: the code object of a function, or any other object, such as a layer's cell.
        key: distinguishes the problems of one subject.
    """
    try:
        ledgers = _ledgers.setdefault(subject, {})
    except TypeError:  # not hashable, or without weak references
        ledgers = _ledgers.setdefault(type(subject), {})
    if key not in ledgers and len(ledgers) >= MOST:
        ledgers.clear()
    return ledgers.setdefault(key, Ledger())


def forget() -> None:
    """Forget all counts: the next backward pass of each layer or function is its first again."""
    _ledgers.clear()


def subject_of(f: Any) -> Any:
    """Return what identifies a map: the code object of a function, or the object behind a bound method.

    `functools.partial` and `__wrapped__` are unwrapped first.
    """
    for _ in range(16):
        code = getattr(f, "__code__", None)
        if code is not None and not f.__dict__:
            return code
        if isinstance(f, functools.partial):
            f = f.func
        elif getattr(f, "__self__", None) is not None and hasattr(f, "__func__"):
            f = f.__self__
        elif "__wrapped__" in getattr(f, "__dict__", {}):
            f = f.__wrapped__
        else:
            return f if code is None else code
    return f


class Account:
    """Where the counts of one map are: it does not keep the map alive.

    Args:
        f: the map. A function has a ledger for its code object, strategy and `key`; any other object (a layer's cell)
            has one for each strategy.
        strategy: what finds the gradient.
        key: what tells the problems of one function apart: shapes and dtype.
    """

    __slots__ = ("__weakref__", "_key", "_subject")

    def __init__(self, f: Callable[..., Any], strategy: Hashable, key: Hashable) -> None:
        subject = subject_of(f)
        self._key = (strategy, key) if isinstance(subject, CodeType) else strategy
        try:
            self._subject: Callable[[], Any] = ref(subject)
        except TypeError:  # without weak references
            self._subject = ref(type(subject))

    @property
    def ledger(self) -> Ledger:
        """Counts of the layer or function; of this account if that is gone, as compiled code may outlive it."""
        subject = self._subject()
        return ledger(self if subject is None else subject, self._key)
