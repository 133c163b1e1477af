"""Random depths of looped models, against SciPy's distributions and a hash in Python's integers."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
from scipy import stats

import deqcore
from deqcore.backward.depth import draw, probabilities
from deqcore.backward.looped import Looped


def law(name, mean, sigma):
    """P(depth = 1, 2, …) by SciPy."""
    if name == "fixed":
        return lambda depth: float(depth == mean)
    if name == "uniform":
        return lambda depth: stats.randint(1, int(2 * mean)).pmf(depth)
    if name == "poisson":
        return lambda depth: stats.poisson(mean - 1).pmf(depth - 1)

    def mixed(depth):
        x, weights = np.polynomial.hermite_e.hermegauss(150)
        rates = (mean - 1) * np.exp(sigma * x - sigma**2 / 2)
        return weights @ stats.poisson.pmf(depth - 1, rates) / math.sqrt(2 * math.pi)

    return mixed


@pytest.mark.parametrize(
    ("name", "mean", "sigma"),
    [("fixed", 4, 0.5), ("uniform", 3.5, 0.5), ("poisson", 5.5, 0.5), ("poisson", 1.0, 0.5),
     ("log-normal-poisson", 6.0, 0.5), ("log-normal-poisson", 3.0, 1.0)],
)  # fmt: skip
def test_probabilities_are_those_of_scipy(name, mean, sigma):
    table, truth = probabilities(name, mean, sigma), law(name, mean, sigma)
    for depth in range(1, min(len(table), 24) + 1):
        assert table[depth - 1] == pytest.approx(truth(depth), rel=1e-5, abs=1e-10)
    assert table.sum() == pytest.approx(1.0, abs=1e-12)
    assert sum(truth(len(table) + extra) for extra in (1, 2, 3)) < 2.0**-32


def hashed(seed, step):
    """Return the 32 bits of (seed, step): the finalizer of MurmurHash3, twice."""
    word = 2**32 - 1

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & word
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & word
        return x ^ (x >> 16)

    return mix(mix((seed + 1) & word) ^ (step * 0x9E3779B9 & word))


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("name", "mean"), [("uniform", 4.0), ("poisson", 3.0), ("log-normal-poisson", 8.0)])
def test_a_draw_is_the_quantile_of_its_hash(name, mean, traced):
    """Where the step is traced, the same draw is made of arrays."""
    backend, cumulated = deqcore.get_backend(backend="numpy"), np.cumsum(probabilities(name, mean))
    with mock.patch.object(type(backend), "is_traced", return_value=traced), np.errstate(over="ignore"):
        for seed in (0, 7, 2**32 - 2):
            for step in (0, 1, 2, 3, 1000, 2**31, 2**32 - 1):
                expected = 1 + int(np.sum(cumulated * 2**32 <= hashed(seed, step)))
                at = np.asarray(step, np.uint32) if traced else step
                found = draw(backend, name, mean, 0.5, seed, at, np.zeros(1))
                assert int(np.squeeze(found)) == expected, (seed, step)
                assert traced or isinstance(found, int)


@pytest.mark.parametrize("name", ["uniform", "poisson", "log-normal-poisson"])
def test_each_seed_has_its_own_depths(name):
    backend = deqcore.get_backend(backend="numpy")
    like = np.zeros((1, 1))
    strategies = [Looped(depth=8, distribution=name, seed=seed) for seed in range(4)]
    drawn = {tuple(each.total(backend, step, like) for step in range(20)) for each in strategies}
    assert len(drawn) == 4
