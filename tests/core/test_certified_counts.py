"""The vjps that a certified solve reports are the calls that took place, whatever ends it."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.backward.exact_ift import ExactIFT


@pytest.mark.parametrize("target", [1e-3, 1e-5, 1e-9, 1e-12])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("slowest", [0.9, 0.9999, 0.999999])
def test_reported_vjps_are_the_calls(slowest, dtype, target):
    """Targets below rounding, where a vjp measures the residual, are among them."""
    backend, rng = deqcore.get_backend(backend="numpy"), np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    a = (q @ np.diag(np.linspace(0.3, slowest, 30)) @ q.T).astype(dtype)
    g, calls = rng.standard_normal((1, 30)).astype(dtype), []

    def vjp(v):
        calls.append(1)
        return v @ a

    with np.errstate(all="ignore"):
        _, report = ExactIFT(max_relative_error=target).solve_adjoint(backend, vjp, g, None)
    assert report.vjps.tolist() == [len(calls)]


@pytest.mark.parametrize("budget", ["auto", 24])
@pytest.mark.parametrize("target", [1e-3, 1e-5])
def test_a_sample_that_is_measured_again_changes_no_figure_of_its_mates(target, budget):
    """Rounding ends the spaces of stiff samples, which a vjp measures and another space continues; others are done."""
    backend, rng = deqcore.get_backend(backend="numpy"), np.random.default_rng(3)
    slowest = (0.9, 0.9999, 0.5, 0.99, 0.999999)
    q = np.linalg.qr(rng.standard_normal((len(slowest), 30, 30)))[0]
    modes = np.stack([np.linspace(0.3, each, 30) for each in slowest])
    a = (q @ (modes[:, :, None] * np.swapaxes(q, 1, 2))).astype("float32")
    g = rng.standard_normal((len(slowest), 30)).astype("float32")
    strategy = ExactIFT(max_relative_error=target, max_steps=budget, direct=0)

    def solved(rows):
        with np.errstate(all="ignore"):
            return strategy.solve_adjoint(backend, lambda u: np.sum(a[rows] * u[:, :, None], axis=1), g[rows], None)[1]

    together = solved(slice(None))
    for i in range(len(slowest)):
        alone = solved(slice(i, i + 1))
        for name, one, other in zip(alone._fields, alone, together, strict=True):
            np.testing.assert_allclose(other[i], one[0], rtol=1e-4, err_msg=f"{name} of sample {i}")
