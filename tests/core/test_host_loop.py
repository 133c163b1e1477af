"""The loop on the host: the results of the loop on devices, at the cost of few operations."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deqcore_torch import compiled  # noqa: E402
from deqcore_torch.backend import TorchBackend  # noqa: E402
from deqcore_torch.host import TorchHost  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import deqcore  # noqa: E402
from deqcore.solve.loop import iterate  # noqa: E402
from deqcore.solvers.anderson import Anderson  # noqa: E402
from deqcore.solvers.broyden import Broyden  # noqa: E402
from deqcore.solvers.picard import Picard  # noqa: E402
from deqcore.types import StoppingCriteria  # noqa: E402

MAPS = {
    "converges": lambda z: 0.5 * torch.tanh(z) + torch.tensor([1.0, -2.0, 0.5]),
    "converges at different steps": lambda z: (
        torch.tensor([[0.1], [0.5], [0.9]]) * torch.tanh(z) + torch.tensor([1.0, -2.0, 0.5])
    ),
    "one sample grows": lambda z: torch.tensor([[0.5], [1.5], [0.5]]) * z + 1.0,
    "one sample leaves the range": lambda z: torch.where(
        z > 4.0, torch.inf, torch.tensor([[0.5], [3.0], [0.2]]) * z + 1
    ),
    "an equilibrium at 0": lambda z: 0.5 * z,
    "NaN from the start": lambda z: torch.tensor([[0.5], [torch.nan], [0.5]]) * z + 1.0,
}


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("control", [StoppingCriteria(1e-5, max_steps=40), StoppingCriteria(0.0, 1e-4, max_steps=12)])
@pytest.mark.parametrize("name", MAPS)
def test_the_host_decides_what_a_device_decides(monkeypatch, name, control, solver):
    monkeypatch.setattr(compiled, "reading", lambda x: None)  # the same steps in both loops
    z0 = torch.zeros(3, 3) if name != "an equilibrium at 0" else torch.ones(3, 3)
    with torch.no_grad():
        host = iterate(TorchBackend(), solver, MAPS[name], z0, control)
        monkeypatch.setattr(TorchHost, "numpy_view", lambda self, x: None)
        device = iterate(TorchBackend(), solver, MAPS[name], z0, control)
    assert host.status.tolist() == device.status.tolist()
    done = host.status == 1  # elsewhere a device may refuse a step some steps later
    assert host.steps[done].tolist() == device.steps[done].tolist()
    np.testing.assert_allclose(host.z[done], device.z[done], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(host.residual[done], device.residual[done], rtol=1e-4, atol=1e-6)


def secant(f, z, rtol):
    """Return the steps of the secant method in double precision, whose first step is f(z)."""
    before, g = z, f(z) - z
    z = f(z)
    for steps in range(1, 50):
        after = f(z) - z
        if abs(after) <= rtol * abs(f(z)):
            return steps
        slope = (after - g) / (z - before)
        before, g, z = z, after, z - after / slope
    return None


@pytest.mark.parametrize("portable", [False, True])
def test_anderson_is_the_secant_method_for_one_number(monkeypatch, portable):
    """With more differences than numbers, their coefficients are rounding: up to 38 steps instead of 6."""
    if portable:
        monkeypatch.setattr(compiled, "loaded", lambda kind: None)
    rng = np.random.default_rng(1)
    w, b = 1.2 * rng.standard_normal((64, 1)), rng.standard_normal((64, 1))
    wide, shift = torch.tensor(w, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    with torch.no_grad():
        f = lambda z: torch.tanh(wide * z + shift)
        found = iterate(TorchBackend(), Anderson(), f, torch.zeros(64, 1), StoppingCriteria(1e-5))
    expected = [
        secant(lambda z, a=a, c=c: np.tanh(a * z + c), 0.0, 1e-5) for a, c in zip(w[:, 0], b[:, 0], strict=True)
    ]
    assert bool((found.status == 1).all())
    assert np.abs(found.steps.numpy() - np.array(expected)).max() <= 1  # rounding near the tolerance
    assert int(found.steps.max()) <= 6


class Counted(TorchDispatchMode):
    """Counts the operations of torch that compute something."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        free = ("detach", "view", "alias", "new_empty", "lift_fresh", "select", "slice")
        self.count += str(func).split(".")[1] not in free
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("solver", "start", "step"), [("picard", 10, 4), ("anderson", 60, 10), ("broyden", 40, 12)])
def test_a_small_solve_takes_few_operations(solver, start, step):
    pytest.importorskip("numba")
    x, w = torch.ones(1, 4), torch.full((1,), 0.5)  # f takes three operations

    def solve():
        with torch.no_grad():
            return deqcore.fixed_point(lambda z, x, w: w * torch.tanh(z) + x, 0 * x, x, w, forward__solver=solver)

    solve()
    with Counted() as counted:
        steps = int(solve().steps)
    assert counted.count <= start + 3 + step * steps
