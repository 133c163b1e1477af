"""The data sets of the study, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from deqcore.errors import ConfigError, UnknownNameError
from deqcore.study.data import arrays, digits, images, text
from deqcore.study.data.base import DataError, Dataset, Split
from deqcore.study.own import load_object
from deqcore.study.settings import DataChoice

LOADERS: Final[dict[str, Callable[[DataChoice], Dataset]]] = {
    "digits": lambda _: digits.load(),
    "images": images.load,
    "arrays": arrays.load,
    "text": text.load,
}

__all__ = ["LOADERS", "DataError", "Dataset", "Split", "load"]


def load(choice: DataChoice, own: str | None = None) -> Dataset:
    """Read a data set.

    Args:
        choice: which.
        own: import string of the user's own function, `module:function`; comes from the command line only.

    Raises:
        UnknownNameError: there is no such data set.
        DataError: it cannot be used.
        ConfigError: the user's function cannot be imported, or returns something else than a `Dataset`.
    """
    if choice.name == "own" and own is not None:
        function = load_object("--data", own)
        found = function() if callable(function) else function
        if not isinstance(found, Dataset):
            raise ConfigError(
                f"--data {own!r} gave {type(found).__name__}, but a deqcore.study.data.Dataset is expected."
            )
        return found
    if choice.name not in LOADERS:
        raise UnknownNameError.of("data set", choice.name, LOADERS)
    return LOADERS[choice.name](choice)
