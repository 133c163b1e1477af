"""Compiled solves: what stays when compiled code is freed, the first solve, and the modes of torch.compile."""

from __future__ import annotations

import gc
import shutil
import weakref

import pytest

import deqcore
from deqcore.errors import BackendError
from deqcore.solve import dispatch

torch = pytest.importorskip("torch")
from deqcore_torch import problems  # noqa: E402
from deqcore_torch.nn import DEQ  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:Not enough SMs:UserWarning"),
]
N = 3


def function():
    """Return a function with a solve, and the parameters of its cell."""
    linear = torch.nn.Linear(N, N)
    linear.weight.data *= 0.3

    def fn(x):
        return deqcore.fixed_point(lambda z, x: torch.tanh(linear(z) + x), torch.zeros_like(x), x).value

    return fn, linear.weight


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_captured_function_is_freed_with_its_compiled_code(backend):
    gc.collect()
    others = set(problems.numbered)
    fn, weight = function()
    run = torch.compile(fn, backend=backend, fullgraph=True)
    x = torch.randn(2, N)
    run(x).sum().backward()
    (number,) = set(problems.numbered) - others
    problem = weakref.ref(problems.numbered[number])
    gc.collect()
    expected = torch.autograd.grad(fn(x).sum(), weight)[0]
    assert torch.equal(torch.autograd.grad(run(x).sum(), weight)[0], expected)  # the code still has its graph
    del run, fn
    torch._dynamo.reset()
    gc.collect()
    assert set(problems.numbered) == others
    assert problem() is None


def test_a_function_is_captured_before_the_backend_was_used(monkeypatch):
    monkeypatch.delitem(dispatch._instances, "torch", raising=False)
    fn, _ = function()
    x = torch.randn(2, N)
    assert torch.equal(torch.compile(fn, backend="eager", fullgraph=True)(x), fn(x))


@pytest.mark.supports(
    "a cell that branches on values, compiled",
    backends="torch",
    strategies="any",
    answer="yes in a layer, else refused",
)
def test_a_branch_on_values_works_in_a_layer_and_is_refused_in_a_function():
    def f(z, x):
        return 0.5 * torch.tanh(z) + x if z.sum() > 0 else 0.3 * z + x

    x = torch.randn(2, N)
    layer = DEQ(f)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))
    run = torch.compile(lambda x: deqcore.fixed_point(f, torch.zeros_like(x), x).value, backend="eager")
    with pytest.raises(BackendError, match=r"torch\.where"):
        run(x)


@pytest.mark.supports("`torch.compile(dynamic=True)`", backends="torch", strategies="exact-ift")
def test_dynamic_shapes_take_one_graph_for_all_batches():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    layer = DEQ(torch.nn.Sequential(torch.nn.Linear(N, N), torch.nn.Tanh()), forward__on_failure="ignore")
    z0 = lambda batch: torch.zeros(batch, N)
    run = torch.compile(lambda z: layer(z0=z), backend=counter, dynamic=True, fullgraph=True)
    for batch in (2, 5, 7):
        assert torch.equal(run(z0(batch)), layer(z0=z0(batch)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.supports(
    "`torch.compile(mode=…)`: reduce-overhead, max-autotune", backends="torch", strategies="exact-ift"
)
def test_modes_of_the_compiler_give_the_gradients_of_eager_code(mode):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    fn, weight = function()
    around = lambda x: torch.relu(fn(x))
    x = torch.randn(2, N)
    expected, found = (
        torch.autograd.grad(run(x).sum(), weight)[0]
        for run in (around, torch.compile(around, mode=mode, fullgraph=True))
    )
    assert torch.allclose(found, expected, rtol=1e-6)


def test_cuda_graphs_leave_the_operators_out():
    """Inductor splits its CUDA graphs at operators with this tag; a replay of one would hold the steps of one input."""
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is None:
        pytest.skip("this PyTorch has no such tag")
    for operator in (torch.ops.deqcore.solve, torch.ops.deqcore.solve_backward):
        assert tag in operator.default.tags
