"""What a loop carries must keep its structure, shapes and dtypes: compiled loops have one type for it."""

from __future__ import annotations

from typing import Any

from deqcore.testing.strict.array import StrictArray, StrictError
from deqcore.testing.strict.history import StrictHistory


def check_same(before: Any, after: Any, path: str = "the carry") -> None:
    """Compare a carry with what the body made of it.

    Raises:
        StrictError: naming the first place that differs.
    """
    if type(before) is not type(after):
        raise _changed(path, f"was {_describe(before)}", _describe(after))
    if isinstance(before, tuple | list):
        if len(before) != len(after):
            raise _changed(path, f"had {len(before)} parts", str(len(after)))
        names = getattr(before, "_fields", range(len(before)))
        for name, old, new in zip(names, before, after, strict=True):
            check_same(old, new, f"{path}.{name}" if isinstance(name, str) else f"{path}[{name}]")
    elif isinstance(before, dict):
        if list(before) != list(after):
            raise _changed(path, f"had the keys {list(before)}", str(list(after)))
        for name in before:
            check_same(before[name], after[name], f"{path}[{name!r}]")
    elif isinstance(before, StrictArray):
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise _changed(path, f"was {_describe(before)}", _describe(after))
    elif isinstance(before, StrictHistory):
        if before.kind != after.kind:
            raise _changed(path, f"was a history of {before.kind}", str(after.kind))
    elif before is not None:
        raise StrictError(
            f"In a loop {path} is {_describe(before)}, but only arrays, histories and (named) tuples of them can be "
            f"carried: make it an array with backend.asarray(…, like=z), or an option of the dataclass."
        )


def _changed(path: str, before: str, after: str) -> StrictError:
    return StrictError(f"In a loop {path} {before} before the step and {after} after it; it must stay the same.")


def _describe(value: Any) -> str:
    if isinstance(value, StrictArray):
        return f"{value.dtype} {value.shape}"
    return f"a {type(value).__name__}"
