"""Random total depths of a looped model: distributions on 1, 2, …, drawn from a seed and a training step.

A draw is a counter-based hash of (seed, step) compared with a table of the distribution, in integers. It is the same in
every framework, on every rank and after a restart, and it can be traced: another step compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import lgamma, log
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deqcore.abc.backend import Backend
from deqcore.types import Array

DISTRIBUTIONS: Final = ("fixed", "uniform", "poisson", "log-normal-poisson")
SIGMA: Final = 0.5  # of the logarithm of the rate, as in the source
RANGE: Final = 2**32
NODES: Final = np.linspace(-7.0, 7.0, 1401)  # of the normal distribution; the trapezoidal rule is exact to rounding


def probabilities(distribution: str, mean: float, sigma: float = SIGMA) -> NDArray[np.float64]:
    """Return the probabilities of the depths 1, 2, …; all further ones together are below 2^-32.

    Args:
        distribution: "fixed": `mean` itself. "uniform": on 1, …, 2·mean − 1. "poisson": 1 + Poisson(mean − 1).
            "log-normal-poisson": the same with a log-normal rate of that mean.
        mean: mean depth, at least 1.
        sigma: standard deviation of the logarithm of the rate.

    Source: Geiping et al. (2025), "Scaling up test-time compute with latent reasoning", arXiv:2502.05171, §3.3; their
    r̄ is mean − 1.

    Example:
        >>> probabilities("uniform", 2.0).round(3).tolist()
        [0.333, 0.333, 0.333]
        >>> table = probabilities("log-normal-poisson", 9.0)
        >>> round(float(table @ np.arange(1, len(table) + 1)), 6)
        9.0
    """
    if distribution == "fixed":
        table = np.zeros(int(mean))
        table[-1] = 1.0
        return table
    if distribution == "uniform":
        count = round(2 * mean) - 1
        return np.full(count, 1.0 / count)
    rate = mean - 1.0
    if rate == 0.0:
        return np.ones(1)
    if distribution == "poisson":
        rates, weights = np.array([rate]), np.ones(1)
    else:
        rates = np.exp(log(rate) - sigma**2 / 2 + sigma * NODES)
        weights = np.exp(-(NODES**2) / 2)
        weights /= weights.sum()
    most = int(rates[-1] + 8.0 * rates[-1] ** 0.5 + 16.0)
    counts = np.arange(most + 1)
    factorials = np.array([lgamma(count + 1.0) for count in counts])
    table = np.zeros(most + 1)
    for share, one in zip(weights, rates, strict=True):
        table += share * np.exp(counts * log(one) - one - factorials)
    table /= table.sum()
    return table


@lru_cache(maxsize=64)
def _thresholds(distribution: str, mean: float, sigma: float) -> NDArray[np.uint32]:
    """Return the cumulated probabilities in units of 2^-32; the depth is 1 + how many of them a draw reaches."""
    cumulated = np.cumsum(probabilities(distribution, mean, sigma))[:-1]
    ends = np.minimum(np.round(cumulated * RANGE), RANGE - 1).astype(np.uint32)
    return ends[: int(np.searchsorted(ends, RANGE - 1)) + 1]


def draw(
    backend: Backend, distribution: str, mean: float, sigma: float, seed: int, step: Any, like: Array
) -> int | Array:
    """Return the total depth of a training step: a number, or a scalar int32 where `step` is traced.

    Args:
        backend: the backend of `step` and `like`.
        distribution: see `probabilities`.
        mean: see `probabilities`.
        sigma: see `probabilities`.
        seed: the seed.
        step: the training step, an integer or a traced scalar.
        like: an array on the device.
    """
    ends = _thresholds(distribution, mean, sigma)
    if not backend.is_traced(step):
        return 1 + int(np.count_nonzero(ends <= _bits(seed, np.array([int(step) % RANGE], np.uint32), _host_word)))
    xp = backend.xp

    def word(value: Any) -> Array:
        return backend.asarray(np.uint32(value), like=like, dtype="uint32")

    passed = word(ends) <= _bits(seed, xp.astype(step, xp.uint32), word)
    return 1 + xp.sum(xp.astype(passed, xp.int32), dtype=xp.int32)


def _bits(seed: int, step: Array, word: Callable[[Any], Array]) -> Array:
    """Return 32 random bits of (seed, step); `word` makes an array of uint32, whose products wrap."""
    return _mixed(_mixed(word([seed + 1]), word) ^ (step * word([0x9E3779B9])), word)


def _mixed(x: Array, word: Callable[[Any], Array]) -> Array:
    """Return the finalizer of MurmurHash3 (Appleby, public domain)."""
    x = (x ^ (x >> word([16]))) * word([0x85EBCA6B])
    x = (x ^ (x >> word([13]))) * word([0xC2B2AE35])
    return x ^ (x >> word([16]))


def _host_word(value: Any) -> NDArray[np.uint32]:
    return np.asarray(value, np.uint32)
