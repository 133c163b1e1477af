"""Text that any file, terminal and page can take."""

from __future__ import annotations

import math


def encodable(text: object) -> str:
    r"""Return the text with a question mark for each lone surrogate, which no encoding of Unicode has.

    Example:
        >>> encodable("a\ud800b"), encodable(3)
        ('a?b', '3')
    """
    given = str(text)
    return given if given.isascii() else given.encode(errors="replace").decode()


def printable(text: object) -> str:
    r"""Return the text for people: without control characters, too.

    Example:
        >>> printable("a\x00b\n")
        'a\ufffdb '
    """
    shown = (" " if item.isspace() else item if item.isprintable() else "\ufffd" for item in encodable(text))
    return "".join(shown)


def plain(value: object) -> object:
    """Return a value as strict JSON has it: string keys, no NaN or infinity, no lone surrogates.

    Example:
        >>> plain({1: float("inf"), "a": (True, None)})
        {'1': 'inf', 'a': [True, None]}
    """
    if isinstance(value, dict):
        return {encodable(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return value if value is None or isinstance(value, (bool, int)) else encodable(value)
