"""The items of a stream, taken from the user's iterator one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from deqcore.errors import ProblemError, described
from deqcore.solve.sample import Sample
from deqcore.types import Tree


class Source:
    """The items of a stream, numbered; it ends at the first error, which it keeps."""

    def __init__(self, inputs: Iterable[Any], start: Callable[..., Tree] | None) -> None:
        self.items, self.start = iter(inputs), start
        self.count = 0
        self.ended = False
        self.error: BaseException | None = None

    def next(self, accept: Callable[[Tree, tuple[Any, ...], int], Sample]) -> Sample | None:
        """Return the next item as `accept(z0, args, index)` returns it; None: there is none, now or ever."""
        if self.ended:
            return None
        try:
            item = next(self.items)
            if item is None:
                return None
            sample = accept(*self._split(item), self.count)
        except StopIteration:
            self.ended = True
            return None
        except Exception as error:
            self.ended, self.error = True, error
            return None
        self.count += 1
        return sample

    def _split(self, item: Any) -> tuple[Tree, tuple[Any, ...]]:
        if not isinstance(item, tuple) or hasattr(item, "_fields") or (self.start is None and not item):
            what = "(z0, *args)" if self.start is None else "args"
            raise ProblemError(f"Item {self.count} of the stream must be a tuple {what} (got {described(item)}).")
        return (item[0], item[1:]) if self.start is None else (self.start(*item), item)
