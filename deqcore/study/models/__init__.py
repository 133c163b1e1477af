"""The models of the study, by name."""

from __future__ import annotations

from typing import Final

from deqcore.errors import UnknownNameError
from deqcore.study.models.attention import Attention, AttentionExplicit
from deqcore.study.models.base import Model
from deqcore.study.models.conv import Conv, ConvExplicit
from deqcore.study.models.dense import Dense, DenseExplicit
from deqcore.study.models.slow import Slow
from deqcore.study.own import load_own

MODELS: Final[dict[str, type[Model]]] = {
    "dense": Dense,
    "dense-explicit": DenseExplicit,
    "conv": Conv,
    "conv-explicit": ConvExplicit,
    "slow": Slow,
    "attention": Attention,
    "attention-explicit": AttentionExplicit,
}


def find(name: str, own: str | None = None) -> type[Model]:
    """The class of a model.

    Args:
        name: of a built-in one, or "own".
        own: import string of the user's own, `module:Class`; comes from the command line only.

    Raises:
        UnknownNameError: there is no such model.
        ConfigError: the user's own cannot be imported or is no Model.
    """
    if name == "own" and own is not None:
        found: type[Model] = load_own("--model", own, Model)
        return found
    if name not in MODELS:
        raise UnknownNameError.of("model", name, MODELS)
    return MODELS[name]
