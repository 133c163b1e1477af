"""Data that drifts: what a model meets that is trained again and again, a little different each time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deqcore.study.data.base import Dataset, Split

SEED: Final = 0
Change: TypeAlias = Callable[[Split], Split]


def drifted(data: Dataset, amount: float) -> Dataset:
    """Return the same samples after a drift; all strategies and seeds meet the same one.

    Numbers: every feature gets a gain 1 + a·n and an offset a·m·s, with n and m normal, fixed for the feature, and s
    the standard deviation of the training inputs: sensors that lose their calibration. Tokens: a share a of the words
    change their places among each other, in inputs and targets: words that change their meaning.

    Args:
        data: before the drift.
        amount: a; 0 changes nothing.
    """
    if amount == 0:
        return data
    rng = np.random.default_rng([SEED, len(data.classes)])
    change = _words(rng, data, amount) if data.kind == "tokens" else _features(rng, data, amount)
    return replace(data, train=change(data.train), validation=change(data.validation), test=change(data.test))


def _features(rng: np.random.Generator, data: Dataset, amount: float) -> Change:
    gain, offset = rng.standard_normal((2, *data.shape.sample)) * amount
    offset = offset * float(np.std(data.train.x))
    dtype = data.train.x.dtype
    return lambda split: Split((split.x * (1 + gain) + offset).astype(dtype), split.y)


def _words(rng: np.random.Generator, data: Dataset, amount: float) -> Change:
    moved = _exchange(rng, len(data.classes), amount)
    return lambda split: Split(moved[split.x], moved[split.y])


def _exchange(rng: np.random.Generator, words: int, amount: float) -> NDArray[np.int64]:
    """Return a permutation that moves a share of all words; what moves at a small share moves at a larger one."""
    order = rng.permutation(words)
    chosen = order[: round(min(1.0, amount) * words)]
    moved = np.arange(words)
    moved[chosen] = np.roll(chosen, 1)
    return moved
