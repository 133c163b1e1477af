"""What only a CUDA device can show. Truth: the same solve on the CPU, the conformance suite, counters of the device."""

import importlib.util
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

import deqcore
from deqcore.errors import DeqcoreError

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SOLVERS = ["picard", "anderson", "broyden", "newton-krylov"]
STRATEGIES = ["exact-ift", "broyden-reuse", "jacobian-free", "neumann", "phantom", "unrolled"]


def cell(z, w, x):
    return torch.tanh(z @ w + x)


def weights(batch=16, n=32, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    w = 0.5 * torch.randn(n, n, generator=generator) / n**0.5
    x = torch.randn(batch, n, generator=generator)
    return w.to(device, dtype), x.to(device, dtype)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_conformance_suite(framework):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"needs {framework}")
    command = ["check", "backend", framework, "--device", "cuda", "--json"]
    process = subprocess.run(
        [sys.executable, "-m", "deqcore.cli.app", *command], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
    assert json.loads(process.stdout)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_cpu_s_equilibrium(solver):
    values = []
    for device in ("cpu", "cuda"):
        w, x = weights(device=device, dtype=torch.float64)
        sol = deqcore.fixed_point(cell, torch.zeros_like(x), w, x, forward__solver=solver, forward__rtol=1e-10)
        assert sol.value.device.type == device
        assert bool(sol.converged.all())
        values.append(sol.value.cpu())
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_cpu_s_gradients(strategy):
    gradients = []
    for device in ("cpu", "cuda"):
        w, x = weights(device=device, dtype=torch.float64)
        w.requires_grad_()
        settings = {"forward__rtol": 1e-10, "backward__strategy": strategy}
        deqcore.fixed_point(cell, torch.zeros_like(x), w, x, **settings).value.square().sum().backward()
        gradients.append(w.grad.cpu())
    close = 1e-3 if strategy == "broyden-reuse" else 1e-6  # it stops at its target, 0.1, and rounding differs before
    torch.testing.assert_close(*gradients, rtol=close, atol=close * float(gradients[0].abs().max()))


def waits(solve):
    """How often the host waits for the device meanwhile."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            solve()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{each.filename}:{each.lineno}" for each in seen if "synchroniz" in str(each.message)]


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_the_host_waits_only_to_ask_who_has_stopped(solver):
    w, x = weights(device="cuda")
    settings = {"forward__solver": solver, "forward__rtol": 1e-5, "forward__check_every": 5}
    solve = lambda: deqcore.fixed_point(cell, torch.zeros_like(x), w, x, **settings)
    solve()  # compiles, allocates
    with torch.no_grad():
        steps = int(solve().steps.max())
        found = waits(solve)
    checks = [place for place in found if "deqcore_torch/backend.py" in place]  # `TorchBackend.loop` asks
    assert len(checks) <= steps // 5 + 2, found
    assert len(found) - len(checks) <= 4, found  # after the solve: did all converge, and must a failure be reported?


def test_a_late_check_changes_nothing():
    w, x = weights(device="cuda")
    found = [
        deqcore.fixed_point(cell, torch.zeros_like(x), w, x, forward__rtol=1e-5, forward__check_every=every)
        for every in (1, 7)
    ]
    assert torch.equal(found[0].value, found[1].value)
    assert torch.equal(found[0].steps, found[1].steps)


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden"])
def test_states_in_bfloat16(solver):
    w, x = weights(device="cuda", dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sol = deqcore.fixed_point(cell, torch.zeros_like(x), w, x, forward__solver=solver, forward__rtol=2e-2)
    assert sol.value.dtype is torch.bfloat16
    assert bool(sol.converged.all())


def test_autocast_and_a_scaler():
    torch.manual_seed(0)
    from deqcore_torch.nn import DEQ

    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(32, 32)
            torch.nn.init.normal_(self.linear.weight, std=0.05)

        def forward(self, z, x):
            return torch.tanh(self.linear(z) + x)

    layer = DEQ(Cell()).cuda()
    scaler = torch.amp.GradScaler("cuda")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(8, 32, device="cuda")
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = (layer(x) - 0.2).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_state_and_a_cell_on_two_devices():
    w, x = weights(device="cuda")
    with pytest.raises((DeqcoreError, RuntimeError), match=r"cuda|device"):
        deqcore.fixed_point(cell, torch.zeros(16, 32), w, x)


def test_a_device_that_is_not_there():
    with pytest.raises(DeqcoreError, match="cuda:99"):
        deqcore.get_backend(backend="torch").to_device(torch.zeros(1), "cuda:99")


def test_memory_grows_with_the_steps_taken():
    """k + 1 history vectors, in chunks of 4, and others whose number is fixed, however large the memory is.

    The others: z0, four of the driver's before and after a step, what a step reads and writes, and f's own three.
    """
    n = 2**20
    x = torch.randn(8, n, device="cuda")
    rate = torch.full((8, 1), 0.9, device="cuda")
    f = lambda z, x: rate * torch.sin(z) + x
    vector = 4 * x.numel()
    with torch.no_grad():
        deqcore.fixed_point(f, torch.zeros_like(x), x, forward__max_steps=1, forward__on_failure="ignore")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sol = deqcore.fixed_point(
            f, torch.zeros_like(x), x, forward__max_steps=6, forward__rtol=1e-6, forward__on_failure="ignore"
        )
        peak = (torch.cuda.max_memory_allocated() - before) / vector
    assert int(sol.steps.max()) == 6
    assert peak <= 8 + 14


def test_jax_and_torch_agree_on_the_device():
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("needs JAX with CUDA")
    import jax.numpy as jnp

    w, x = weights(device="cuda")
    with deqcore.get_backend(backend="torch").harness.high_precision():
        ours = deqcore.fixed_point(cell, torch.zeros_like(x), w, x, forward__rtol=1e-6).value.cpu().numpy()
    with jax.default_matmul_precision("highest"):
        theirs = deqcore.fixed_point(
            lambda z, w, x: jnp.tanh(z @ w + x),
            jnp.zeros(x.shape),
            jnp.asarray(w.cpu().numpy()),
            jnp.asarray(x.cpu().numpy()),
            forward__rtol=1e-6,
        ).value
    np.testing.assert_allclose(ours, np.asarray(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_streams_agree_with_those_on_the_host(solver):
    w, x = weights(batch=20)
    settings = {"forward__solver": solver, "forward__rtol": 1e-5, "forward__max_steps": 200}

    def solved(w, x):
        items = [(torch.zeros_like(row), row) for row in x]
        results = list(deqcore.solve_stream(lambda z, x: cell(z, w, x), items, slots=6, **settings))
        assert all(result.converged for result in results)
        return torch.stack([result.value for result in results])

    found = solved(w.cuda(), x.cuda())
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), solved(w, x), rtol=1e-3, atol=1e-3)
