"""What a warning advises is not what is set already."""

import numpy as np
import pytest

from deqcore import plugins
from deqcore.solution import Tally
from deqcore.solve.messages import failure
from deqcore.types import Status


@pytest.mark.parametrize(("solver", "advised"), [("picard", True), ("gmres", False)])
def test_a_diverged_adjoint_solve_does_not_advise_its_own_solver(solver, advised):
    strategy = plugins.make_strategy("exact-ift", {"solver": solver})
    tally = Tally.of(np, np.array([int(Status.DIVERGED)]), np.array([9]), np.array([0.5]))
    text = failure(tally, strategy, "exact-ift", "warn")
    assert text.startswith("The adjoint solve did not converge for 1 of 1 samples")
    assert ("use solver = 'gmres'" in text) == advised


@pytest.mark.parametrize("solver", ["broyden", "anderson", "newton-krylov"])
@pytest.mark.parametrize("status", [Status.MAX_STEPS, Status.STALLED, Status.DIVERGED])
def test_a_failed_solve_does_not_advise_its_own_solver(status, solver):
    used = repr(plugins.make_solver(solver, {}))
    assert solver not in status.advice(used)
    others = {"broyden", "anderson", "newton-krylov"} - {solver}
    assert all(other in status.advice(used) for other in others)
