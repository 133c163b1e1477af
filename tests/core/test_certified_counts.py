"""The vjps that a certified solve reports are the calls that took place, whatever ends it."""

from __future__ import annotations

import numpy as np
import pytest

import deqcore
from deqcore.backward.broyden_reuse import BroydenReuse
from deqcore.backward.exact_ift import ExactIFT
from deqcore.solve.loop import iterate
from deqcore.solvers.broyden import Broyden
from deqcore.types import Status, StoppingCriteria


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


def test_a_fast_step_after_a_plateau_is_not_believed():
    """Ten slow modes: the residual rests at .9 to .97 a step, then falls fast before the slowest mode has been met."""
    backend, rng = deqcore.get_backend(backend="numpy"), np.random.default_rng(8)
    modes = rng.uniform(-0.5, 0.5, (128, 96))
    modes[:, :10] = np.linspace(0.9, 0.99, 10)
    b, g = rng.standard_normal((2, *modes.shape))
    solver = Broyden(history_size=40)
    forward = iterate(backend, solver, lambda z: modes * z + b, 0 * b, StoppingCriteria(1e-4, max_steps=100))
    estimate = solver.secant_estimate(backend, forward.carry.state)
    u, report = BroydenReuse(fallback="none").solve_adjoint(backend, lambda v: modes * v, g, estimate)
    error = np.linalg.norm(u - g / (1 - modes), axis=1) / np.linalg.norm(g / (1 - modes), axis=1)
    assert (report.status == int(Status.CONVERGED)).all()
    assert np.count_nonzero(error > 0.1) <= 1  # there were three
    assert report.vjps.mean() <= 20
