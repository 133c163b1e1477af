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
