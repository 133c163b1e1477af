"""The data sets of the study, by name: built-in ones, and those of plugins."""

from __future__ import annotations

from typing import Any

from deqcore import plugins
from deqcore.errors import ConfigError, PluginError
from deqcore.study.data.base import DataError, Dataset, Split
from deqcore.study.settings import DataChoice
from deqcore.study.user_code import load_object

__all__ = ["DataError", "Dataset", "Split", "load"]


def load(choice: DataChoice, own: str | None = None) -> Dataset:
    """Read a data set.

    Args:
        choice: which.
        own: import string of the user's own function, `module:function`; comes from the command line only.

    Raises:
        UnknownNameError: the data set is not registered.
        DataError: it cannot be used.
        PluginError: a plugin's function cannot be imported, or returns something else than a `Dataset`.
        ConfigError: the user's own function does so.
    """
    if choice.name == "own" and own is not None:
        function = load_object("--data", own)
        result = function() if callable(function) else function
        if not isinstance(result, Dataset):
            raise ConfigError(f"--data {own!r} must {_unlike(result)}")
        return result
    target: Any = plugins.load("data", choice.name)
    result = target(choice)
    if not isinstance(result, Dataset):
        raise PluginError(f"The data {choice.name!r} must {_unlike(result)}")
    return result


def _unlike(result: object) -> str:
    return f"return a deqcore.study.data.Dataset (got a {type(result).__name__})."
