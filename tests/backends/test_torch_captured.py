"""A solve inside torch.compile is one operator: one graph, and the numbers of eager code."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import NamedTuple

import pytest

import deqcore
from deqcore.errors import BackendError, StrategyError

torch = pytest.importorskip("torch")
from deqcore_torch import operators, problems  # noqa: E402
from deqcore_torch.cells import VariationalDropout  # noqa: E402
from deqcore_torch.nn import DEQ  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
]

N = 4
DOUBLE = torch.float64


class Cell(torch.nn.Module):
    def __init__(self, dropout=0.0, dtype=DOUBLE):
        super().__init__()
        self.linear = torch.nn.Linear(N, N, dtype=dtype)
        self.linear.weight.data *= 0.6
        self.dropout = VariationalDropout(dropout)

    def forward(self, z, x):
        return torch.tanh(self.dropout(self.linear(z)) + x)


class Model(torch.nn.Module):
    def __init__(self, cell, **settings):
        super().__init__()
        self.before = torch.nn.Linear(N, N, dtype=DOUBLE)
        self.layer = DEQ(cell, **settings)
        self.after = torch.nn.Linear(N, 2, dtype=DOUBLE)

    def forward(self, x):
        return self.after(torch.relu(self.layer(torch.relu(self.before(x)))))


def counting(fn, backend="aot_eager", **options):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    return torch.compile(fn, backend=counter, fullgraph=True, **options), counter


def data(batch=3, scale=1.0):
    return scale * torch.randn(batch, N, dtype=DOUBLE)


def assert_same(eager, compiled, x, parameters, rtol=0.0):
    """Values and gradients are bitwise (or to `rtol`) those of eager code, random masks included."""
    results = []
    for fn in (eager, compiled):
        torch.manual_seed(7)
        y = fn(x)
        results.append([y, *torch.autograd.grad((y**2).sum(), parameters)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_hundred_steps_of_other_lengths_and_batches_take_one_graph(backend):
    model = Model(Cell(), forward__rtol=1e-8)
    run, counter = counting(model, backend)
    steps = set()
    for i in range(100):
        x = data(2 + i % 7, 0.1 + 0.1 * i)
        torch._dynamo.mark_dynamic(x, 0)
        if i % 10 == 0:
            assert_same(model, run, x, [*model.parameters()])
        run(x).sum().backward()
        steps.add(int(model.layer.solve(torch.relu(model.before(x))).steps.max()))
    assert len(steps) > 1
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "strategy", ["exact-ift", "broyden-reuse", "jacobian-free", "neumann", "phantom", "unrolled", "adaptive"]
)
@pytest.mark.supports(
    "`torch.compile(fullgraph=True)`",
    backends="torch",
    strategies="exact-ift, broyden-reuse, jacobian-free, neumann, phantom, unrolled, adaptive",
)
def test_every_strategy_gives_the_gradients_of_eager_code(strategy):
    model = Model(Cell(), backward__strategy=strategy)
    run, _ = counting(model)
    x = data().requires_grad_()
    assert_same(model, run, x, [x, *model.parameters()])


def test_the_report_is_in_tensors_and_a_graph_may_use_it():
    layer = DEQ(Cell())

    def fn(x):
        solution = layer.solve(x)
        return torch.where(solution.converged[:, None], solution.value, 0.0), solution

    run, counter = counting(fn)
    x = data()
    value, found = run(x)
    expected = layer.solve(x)
    assert torch.equal(value, expected.value)
    for name in ("residual", "status", "steps", "evaluations"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert counter.frame_count == 1


class Motion(NamedTuple):
    place: torch.Tensor
    speed: torch.Tensor


@dataclass
class Registered:
    place: torch.Tensor
    speed: torch.Tensor


def moving(kind):
    """A solve for a state of two parts, and where it ends."""

    def fn(x):
        f = lambda z, x: kind(0.5 * z.place + z.speed, 0.1 * torch.tanh(z.place) + x)
        return deqcore.fixed_point(f, kind(0.0 * x, 0.0 * x), x, forward__solver="picard").value.place

    return fn


def test_a_named_tuple_is_a_state_of_one_graph():
    run, counter = counting(moving(Motion))
    x, y = (data().requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    found, expected = run(x), moving(Motion)(y)
    assert torch.equal(found, expected)
    assert torch.allclose(*(torch.autograd.grad(each.sum(), given)[0] for each, given in ((found, x), (expected, y))))
    assert counter.frame_count == 1


def test_a_registered_class_is_a_state_across_a_graph_break():
    """The compiler traces a tree library of its own, whose structures equal none of the real one's."""
    pytree = torch.utils._pytree
    if Registered not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            Registered, lambda r: ([r.place, r.speed], None), lambda parts, _: Registered(*parts)
        )
    x = data()
    assert torch.equal(torch.compile(moving(Registered), backend="eager")(x), moving(Registered)(x))


@pytest.mark.parametrize("tree", [False, True])
def test_fixed_point_of_a_function_is_one_graph_too(tree):
    linear = torch.nn.Linear(N, N, dtype=DOUBLE)
    linear.weight.data *= 0.4

    def plain(x):
        return deqcore.fixed_point(lambda z, x: torch.tanh(linear(z) + x), torch.zeros_like(x), x).value

    def nested(x):
        def f(z, given):
            return {
                "b": torch.tanh(linear(z["b"]) + given["x"] * given["k"]),
                "a": 0.3 * z["a"] + z["b"].sum(1, keepdim=True),
            }

        z0 = {"b": torch.zeros_like(x), "a": x.new_zeros(len(x), 1)}
        value = deqcore.fixed_point(f, z0, {"x": x, "k": 2.0, "none": None}, forward__solver="picard").value
        return value["b"] + value["a"]

    fn = nested if tree else plain
    run, counter = counting(fn)
    for _ in range(2):  # eager code sorts the leaves of a dict, so its sums have another order
        assert_same(fn, run, data(), [*linear.parameters()], rtol=1e-12 if tree else 0.0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("same", [False, True])
def test_batched_arguments_reach_a_solve_that_drops_finished_rows(same):
    linear = torch.nn.Linear(N, N, dtype=DOUBLE)
    linear.weight.data *= 0.4

    def fn(x, scale):
        f = lambda z, x, y, scale: torch.tanh(linear(z) * scale + 0.5 * (x + y))
        y = x if same else 2.0 * x
        settings = {"forward__compact": True, "forward__solver": "picard"}
        return deqcore.fixed_point(f, torch.zeros_like(x), x, y, scale, batched_args=(0, 1, 2), **settings).value

    x = data(4) * torch.logspace(-2, 1, 4, dtype=DOUBLE)[:, None]
    run, counter = counting(fn)
    scale = torch.linspace(0.1, 1.0, 4, dtype=DOUBLE)[:, None]
    assert torch.equal(run(x, scale), fn(x, scale))
    assert counter.frame_count == 1


def test_a_tensor_that_is_z0_and_an_argument_and_hidden_in_f_keeps_its_parts_apart():
    def fn(x):
        return deqcore.fixed_point(lambda z, y: 0.3 * torch.cos(z) + y * x, x, x, forward__rtol=1e-12).value

    x = data().requires_grad_()
    assert_same(fn, counting(fn)[0], x, [x], rtol=1e-10)


def test_two_calls_before_one_backward_pass_and_no_record_is_left(collect_new):
    others = set(operators._records)
    model = Model(Cell())
    run, _ = counting(model)
    a, b = data(), data()
    found, expected = (
        torch.autograd.grad((fn(a) ** 2).sum() + fn(b).sum(), [*model.parameters()]) for fn in (run, model)
    )
    for g, h in zip(found, expected, strict=True):
        assert torch.allclose(g, h, rtol=1e-12)
    run(a)  # without a backward pass
    collect_new()
    assert set(operators._records) <= others


def test_random_masks_differ_between_two_calls_in_one_graph_and_return_in_a_checkpoint():
    model = Model(Cell(dropout=0.3))
    twice = lambda x: model(x) + 2 * model(x)
    assert_same(twice, counting(twice)[0], data(), [*model.parameters()])
    torch._dynamo.reset()
    kept = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    assert_same(kept, counting(kept)[0], data(), [*model.parameters()])


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_reaches_the_cell(inside):
    layer = DEQ(Cell(dtype=torch.float32))
    x = data().float()

    def fn(x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return layer(x)

    def around(run):
        def call(x):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
                return run(x)

        return call

    run = around(counting(fn if inside else layer)[0])
    assert_same(around(fn) if inside else around(layer), run, x, [*layer.parameters()])
    assert not torch.equal(run(x), layer(x))


def test_warm_starts_other_parameters_and_one_system():
    warm, twin = (DEQ(Cell(), reuse="sequence") for _ in range(2))
    twin.load_state_dict(warm.state_dict())
    x = data()
    run, _ = counting(lambda x: twin.solve(x).steps)
    assert [run(x).tolist() for _ in range(2)] == [warm.solve(x).steps.tolist() for _ in range(2)]
    model = Model(Cell(), forward__batch=False)
    other = {name: (1.1 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
    fn = lambda x: torch.func.functional_call(model, other, (x,))
    assert_same(fn, counting(fn)[0], x, [*other.values()])


@pytest.mark.supports("second derivatives of compiled code", backends="torch", strategies="any", answer="refused")
def test_what_a_graph_cannot_carry_is_refused_with_what_to_do():
    weight = torch.nn.Parameter(0.3 * torch.eye(N, dtype=DOUBLE))
    function = DEQ(lambda z, x: torch.tanh(z @ weight + x))
    run, _ = counting(function)
    with pytest.raises(BackendError, match="parameter of the cell"):
        run(data())
    model = Model(Cell())
    run, _ = counting(model, "eager")
    (first, *_) = torch.autograd.grad(run(data()).sum(), [*model.parameters()], create_graph=True)
    with pytest.raises(StrategyError, match="uncompiled"):
        first.sum().backward()
    run, _ = counting(model)
    first = torch.autograd.grad(run(data()).sum(), [*model.parameters()], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first[0].sum().backward()


def test_without_the_means_the_graph_breaks_at_the_solve(monkeypatch):
    from deqcore_torch import captured
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(captured, "AVAILABLE", False)
    model = Model(Cell())
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter)
    assert_same(model, run, data(), [*model.parameters()])
    assert counter.frame_count == 2
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ends when the samples have converged"):
        torch.compile(model, backend="eager", fullgraph=True)(data())


def test_a_cell_that_is_compiled_is_a_region_of_its_own():
    cell = Cell()
    model = Model(cell)
    region, inner = counting(cell)
    x = data()
    expected = torch.autograd.grad((model(x) ** 2).sum(), [*model.parameters()])
    model.layer.cell = region
    run, outer = counting(model)
    for _ in range(3):
        found = torch.autograd.grad((run(x) ** 2).sum(), [*model.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10)
    assert outer.frame_count == 1
    assert 1 <= inner.frame_count <= 3


def test_a_copied_or_restored_layer_is_another_problem(collect_new):
    import copy

    layer = DEQ(Cell())
    twin = copy.deepcopy(layer)
    assert twin.number != layer.number
    twin.cell.linear.weight.data.zero_()
    x = data()
    run, _ = counting(twin)
    assert torch.equal(run(x), torch.tanh(twin.cell.linear.bias + x))
    number = layer.number
    del layer
    torch._dynamo.reset()
    collect_new()
    assert twin.number in problems.numbered
    assert number not in problems.numbered


FIRST = """
import torch, deqcore
x = torch.full((2, 3), 0.5, dtype=torch.float64, requires_grad=True)
solve = lambda x: deqcore.fixed_point(lambda z, x: 0.5 * z + x, 0 * x, x, forward__rtol=1e-10).value.sum()
torch.compile(solve, backend="eager", fullgraph=True)(x).backward()
assert torch.allclose(x.grad, torch.full_like(x, 2.0), rtol=1e-6), x.grad
"""


def test_the_first_call_of_a_process_may_be_a_compiled_one():
    """A compiler cannot trace the import of a backend."""
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
