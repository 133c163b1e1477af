"""torch.compile of f and around a solve: same gradients, few graphs, second derivatives refused with an error."""

from __future__ import annotations

import shutil

import pytest

import deqcore
from deqcore.errors import StrategyError

torch = pytest.importorskip("torch")
# The compiler's own warnings: of what it does not trace, of a .grad that it looks at, of what it loads.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]

N = 4
TIGHT = {"forward__rtol": 1e-12, "backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-12}}


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(N, N, dtype=torch.float64)
        self.linear.weight.data *= 0.6

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


class Model(torch.nn.Module):
    """A layer between others. `layer` False: by `fixed_point` itself."""

    def __init__(self, layer=True):
        from deqcore_torch.nn import DEQ

        super().__init__()
        self.before = torch.nn.Linear(N, N, dtype=torch.float64)
        self.solve = DEQ(Cell(), **TIGHT)
        self.after = torch.nn.Linear(N, 2, dtype=torch.float64)
        self.layer = layer

    def forward(self, x):
        x = torch.relu(self.before(x))
        z = self.solve(x) if self.layer else solved(self.solve.cell, x)
        return self.after(torch.relu(z))


@pytest.fixture
def counter(request):
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(getattr(request, "param", "aot_eager"))


@pytest.fixture
def x():
    return torch.randn(3, N, dtype=torch.float64, requires_grad=True)


def solved(f, x, **overrides):
    return deqcore.fixed_point(f, torch.zeros_like(x), x, **{**TIGHT, **overrides}).value


def compiled(module, backend):
    return torch.compile(module, backend=backend)


def gradients(model, x, parameters):
    return torch.autograd.grad((model(x) ** 2).sum(), parameters)


@pytest.mark.parametrize("counter", ["eager", "aot_eager"], indirect=True)
@pytest.mark.parametrize("strategy", ["exact-ift", "broyden-reuse", "unrolled"])
def test_a_compiled_f_gives_the_same_gradients_and_is_compiled_once_per_mode(counter, x, strategy):
    """With gradients, without, and without a gradient of z: three graphs at most, whatever the data."""
    cell = Cell()
    f = compiled(cell, counter)
    wanted = [x, *cell.parameters()]
    settings = {"backward__strategy": strategy, "backward__options": {}, "forward__rtol": 1e-6}
    for size in range(10):
        loss = lambda f, size=size: (solved(f, (0.5 + size) * x, **settings) ** 2).sum()
        found, expected = (torch.autograd.grad(loss(g), wanted) for g in (f, cell))
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)
    assert 1 <= counter.frame_count <= 3


@pytest.mark.parametrize(
    ("counter", "layer", "graphs"),
    [("eager", True, 1), ("aot_eager", True, 1), ("eager", False, 1)],
    indirect=["counter"],
)
def test_what_surrounds_a_solve_is_one_graph_and_the_solve_is_not_traced(counter, layer, graphs):
    model = Model(layer)
    run = compiled(model, counter)
    parameters = list(model.parameters())
    for size in range(10):
        data = (0.5 + size) * torch.randn(3, N, dtype=torch.float64)
        for a, b in zip(gradients(run, data, parameters), gradients(model, data, parameters), strict=True):
            assert torch.allclose(a, b, rtol=1e-10)
    assert counter.frame_count == graphs


def test_a_layer_with_a_compiled_cell_inside_a_compiled_model(counter):
    from deqcore_torch.nn import DEQ

    model = Model()
    plain = gradients(model, torch.ones(3, N, dtype=torch.float64), list(model.parameters()))
    model.solve = DEQ(compiled(model.solve.cell, counter), **TIGHT)
    run = compiled(model, counter)
    found = gradients(run, torch.ones(3, N, dtype=torch.float64), list(model.parameters()))
    assert counter.frame_count >= 2
    for a, b in zip(found, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


def test_a_full_graph_says_why_there_is_none_and_what_to_do():
    """Settings of a call are not a part of the layer, so the compiler does not carry them."""
    model = Model()
    run = torch.compile(lambda x: model.solve.solve(x, forward__max_steps=3).value, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ends when the samples have converged"):
        run(torch.ones(3, N, dtype=torch.float64))


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_the_default_compiler(x):
    cell = Cell()
    f = torch.compile(cell)
    found, expected = (torch.autograd.grad((solved(g, x) ** 2).sum(), [x, *cell.parameters()]) for g in (f, cell))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9)


# -- twice --------------------------------------------------------------------------------------------------------


def twice(f, x, parameters, **overrides):
    first = torch.autograd.grad((solved(f, x, **overrides) ** 2).sum(), [x, *parameters], create_graph=True)
    return torch.autograd.grad(sum((g**2).sum() for g in first), [x, *parameters])


def test_what_the_eager_backend_compiles_may_be_differentiated_twice(x):
    cell = Cell()
    found, expected = (twice(f, x, [*cell.parameters()]) for f in (compiled(cell, "eager"), cell))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize(
    ("strategy", "says"),
    [("exact-ift", "uncompiled f"), ("broyden-reuse", "exact-ift"), ("jacobian-free", "exact-ift")],
)
def test_compiled_code_differentiated_twice_is_refused_with_what_to_do(x, strategy, says):
    cell = Cell()
    settings = {"backward__strategy": strategy, "backward__options": {}, "forward__rtol": 1e-6}
    with pytest.raises(StrategyError, match=says):
        twice(compiled(cell, "aot_eager"), x, [*cell.parameters()], **settings)


def test_compiled_code_that_closes_over_a_hidden_tensor_is_refused_for_that(x):
    cell = Cell()
    inner = compiled(cell, "aot_eager")
    hidden = 2 * x
    value = deqcore.fixed_point(lambda z: inner(z, hidden), torch.zeros_like(x), **TIGHT).value
    (kept,) = torch.autograd.grad(value.sum(), x, create_graph=True, retain_graph=True)
    (plain,) = torch.autograd.grad(value.sum(), x)
    assert torch.equal(kept, plain)
    with pytest.raises(StrategyError, match="Pass it through args"):
        kept.sum().backward()
