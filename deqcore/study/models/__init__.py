"""The models of the study, by name: built-in ones, and those of plugins."""

from __future__ import annotations

from deqcore import plugins
from deqcore.errors import PluginError
from deqcore.study.models.attention import Attention, AttentionExplicit
from deqcore.study.models.base import Model
from deqcore.study.models.conv import Conv, ConvExplicit
from deqcore.study.models.dense import Dense, DenseExplicit
from deqcore.study.models.slow import Slow
from deqcore.study.user_code import load_own

__all__ = [
    "Attention",
    "AttentionExplicit",
    "Conv",
    "ConvExplicit",
    "Dense",
    "DenseExplicit",
    "Model",
    "Slow",
    "find",
]


def find(name: str, own: str | None = None) -> type[Model]:
    """Return the class of a model.

    Args:
        name: a registered one, or "own".
        own: import string of the user's own, `module:Class`; comes from the command line only.

    Raises:
        UnknownNameError: the model is not registered.
        PluginError: a plugin's model cannot be imported, or is none.
        ConfigError: the user's own model cannot be imported or is not a Model.
    """
    if name == "own" and own is not None:
        result: object = load_own("--model", own, Model)
    else:
        result = plugins.load("model", name)
    if not (isinstance(result, type) and issubclass(result, Model)):
        raise PluginError(f"The model {name!r} must be a subclass of deqcore.study.models.Model (got {result!r}).")
    return result
