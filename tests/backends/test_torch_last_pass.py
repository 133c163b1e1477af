"""The pass that carries u to the parameters: nothing for z, and one gradient for hooks and other users of f's graph."""

from __future__ import annotations

import gc
import weakref

import pytest

from deqcore import fixed_point
from deqcore.backward.adaptive import Adaptive

torch = pytest.importorskip("torch")
from deqcore_torch.nn import DEQ  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

STRATEGIES = {
    "exact-ift": {"rtol": 1e-9},
    "broyden-reuse": {"max_relative_error": 1e-3},
    "neumann": {"terms": 40},
    "adaptive": {"max_relative_error": 0.3},
}
EXACT = {"backward__strategy": "exact-ift", "backward__options": {"rtol": 1e-12}}
NEUMANN = {"backward__strategy": "neumann", "backward__options": {"terms": 60}}


class Count(torch.autograd.Function):
    """Identity that counts the passes through it, also those without a gradient."""

    @staticmethod
    def forward(ctx, x, counts, name):
        ctx.counts, ctx.name, ctx.variable = counts, name, name  # names that PyTorch's own nodes use
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.counts[ctx.name] = ctx.counts.get(ctx.name, 0) + 1
        return g, None, None


def settings(strategy):
    solver = "broyden" if strategy == "broyden-reuse" else "picard"
    return {
        "forward__solver": solver,
        "forward__rtol": 1e-10,
        "backward__strategy": strategy,
        "backward__options": STRATEGIES[strategy],
        "backward__verify_every": 0,
    }


def weights(n=6):
    generator = torch.Generator().manual_seed(3)
    return nn.Parameter(0.5 * torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5)


@pytest.fixture
def x():
    return torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(1, 6)


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_backward_pass_takes_the_reported_vjps_and_one_pass_for_the_parameters(strategy, history, x):
    weight, counts = weights(), {}
    x = x.requires_grad_().sin() if history else x

    def f(z, x):
        return Count.apply(torch.tanh(Count.apply(z, counts, "z") @ weight + x), counts, "y")

    solution = fixed_point(f, torch.zeros_like(x), x, **settings(strategy))
    solution.value.sum().backward()
    taken = int(solution.backward.vjps.max())
    assert counts == {"z": taken, "y": taken + 1}
    assert taken > 1
    assert weight.grad.norm() > 0


def test_a_tensor_with_a_history_in_a_closure_costs_one_vjp_more(x):
    weight, counts = weights(), {}
    hidden = weight * 1.0
    solution = fixed_point(
        lambda z: torch.tanh(Count.apply(z, counts, "z") @ hidden + x), torch.zeros_like(x), **settings("exact-ift")
    )
    solution.value.sum().backward()
    assert counts == {"z": int(solution.backward.vjps.max()) + 1}


def scalar(value):
    return torch.tensor([[value]], dtype=torch.float64, requires_grad=True)


def solved(f, *args, options=EXACT):
    """Return the value of f, whose derivative in z is .5 at each point."""
    return fixed_point(f, torch.zeros(1, 1, dtype=torch.float64), *args, forward__rtol=1e-13, **options).value


REVERSIBLE = {"backward__strategy": "reversible", "backward__options": {"steps": 30}}
BOTH = pytest.mark.parametrize("options", [EXACT, NEUMANN], ids=["exact-ift", "neumann"])


ALL = pytest.mark.parametrize("options", [EXACT, NEUMANN, REVERSIBLE], ids=["exact-ift", "neumann", "reversible"])
CYCLE = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
AGAIN = pytest.mark.parametrize("create_graph", [False, True])


@ALL
@AGAIN
@CYCLE
def test_hooks_of_a_leaf_run_once_with_the_gradient_of_all_its_uses(options, create_graph):
    w, seen, after = scalar(3.0), [], []
    w.register_hook(lambda g: (seen.append(g.item()), 2 * g)[1])
    w.register_post_accumulate_grad_hook(lambda t: after.append(t.grad.item()))
    value = solved(lambda z: 0.5 * z + w**2, options=options)
    late = w.register_hook(lambda g: seen.append(g.item()))
    (value + 5 * w).sum().backward(create_graph=create_graph)
    assert seen == pytest.approx([17.0, 34.0], rel=1e-4)
    assert after == pytest.approx([34.0], rel=1e-4)
    late.remove()
    assert len(w._backward_hooks) == 1


@ALL
@AGAIN
@CYCLE
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_an_argument_run_once_with_the_gradient_of_all_its_uses(options, create_graph, when):
    w, seen = scalar(3.0), []
    x = w * 1.0

    def watch():
        x.register_hook(lambda g: seen.append(g.item()))
        x.retain_grad()

    if when == "before":
        watch()
    value = solved(lambda z, x: 0.5 * z + x**2, x, options=options)
    if when == "after":
        watch()
    (value + 5 * x).sum().backward(create_graph=create_graph)
    assert seen == pytest.approx([17.0], rel=1e-4)
    assert x.grad.item() == pytest.approx(17.0, rel=1e-4)
    assert w.grad.item() == pytest.approx(17.0, rel=1e-4)


@ALL
@AGAIN
@CYCLE
def test_a_hook_of_another_output_of_the_same_node_is_not_called_for_f(options, create_graph):
    w, seen = scalar(3.0), []
    a, b = torch.cat([w, 2 * w]).reshape(2, 1, 1).unbind(0)
    b.register_hook(lambda g: seen.append(g.item()) or g)
    value = solved(lambda z, a: 0.5 * z + a**2, a, options=options)
    (value + 7 * b).sum().backward(create_graph=create_graph)
    assert seen == [7.0]
    assert w.grad.item() == pytest.approx(4 * 3.0 + 14.0, rel=1e-4)


def dependent(w):
    """Return f, whose derivative in z is .5 or 0, its arguments, and the closed form of the equilibrium, by name."""
    x = w * 1.0
    long = w
    for _ in range(100):
        long = long + 0.01
    pair = torch.cat([w, w.exp()], 1)
    return {
        "one argument from the other": (lambda z, x, h: 0.5 * z + x * h, (x, x.tanh()), 2 * w * w.tanh()),
        "the same twice": (lambda z, a, b: 0.5 * z + a * b**2, (x, x), 2 * w**3),
        "leaf and what is made of it": (lambda z, h: 0.5 * z + w * h, (w.sin(),), 2 * w * w.sin()),
        "leaf as argument and by closure": (lambda z, a: 0.5 * z + a * w, (w,), 2 * w * w),
        "argument that f closes over": (lambda z, a: 0.5 * z + a * x.sin(), (x,), 2 * w * w.sin()),
        "hidden in a closure": (lambda z: 0.5 * z + w * x.sin(), (), 2 * w * w.sin()),
        "hidden behind an argument": (lambda z, a: 0.5 * z + a * x.sin(), (x.exp(),), 2 * w.exp() * w.sin()),
        "a long history": (lambda z, a: 0.5 * z + a * w, (long,), 2 * (w + 1) * w),
        "f returns its argument": (lambda z, a: a, (w * 2.0,), w * 2.0),
        "f returns a leaf": (lambda z: w, (), w * 1.0),
        "an argument that f does not read": (lambda z, a: 0.5 * z + w, (w.sin(),), 2 * w),
        "views": (lambda z, a, b: 0.5 * z + a * b, (pair[:, :1], pair[:, 1:]), 2 * w * w.exp()),
    }


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = weights()

    def forward(self, z, x):
        return torch.tanh(z @ self.weight + x)


def test_hooks_of_a_parameter_run_once_in_a_pass_with_an_audit(x):
    options = {"max_relative_error": 0.3}
    layer, seen = DEQ(Cell(), backward__strategy="adaptive", backward__options=options), []
    layer.cell.weight.register_hook(lambda g: seen.append(g) or 2 * g)
    layer(x).sum().backward()
    assert Adaptive(**options).learned(layer.strategy_state).audits == 1
    assert len(seen) == 1
    torch.testing.assert_close(layer.cell.weight.grad, 2 * seen[0])


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_solve(options, reentrant):
    w, v = scalar(3.0), scalar(2.0)
    value = checkpoint(
        lambda x: solved(lambda z, x: 0.5 * z + w * x, x.sin(), options=options), v * 1.0, use_reentrant=reentrant
    )
    value.sum().backward()
    assert w.grad.item() == pytest.approx(2 * v.sin().item())
    assert v.grad.item() == pytest.approx(6 * v.cos().item())


def test_f_without_anything_to_differentiate_still_reports():
    solution = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(1, 1), backward__strategy="neumann")
    solution.value.sum().backward()
    assert int(solution.backward.vjps.max()) > 0


@BOTH
@pytest.mark.parametrize("case", dependent(torch.ones(1, 1)))
def test_gradients_of_arguments_that_depend_on_each_other(options, case):
    w = scalar(0.7)
    f, args, truth = dependent(w)[case]
    (expected,) = torch.autograd.grad(truth.sum() + w.sum(), w)
    value = solved(f, *args, options=options)
    (value + w).sum().backward()
    assert w.grad.item() == pytest.approx(expected.item(), rel=1e-9)


@BOTH
def test_tensors_that_f_gives_away_stay_usable(options):
    """An auxiliary loss of f's last evaluation, and a tensor that depends on parameters alone (a cache of weights)."""
    w, kept = scalar(3.0), {}

    def f(z):
        kept["square"], kept["loss"] = w**2, (w.sin() * z).sum()
        return 0.5 * z + kept["square"]

    value = solved(f, options=options)
    (value.sum() + kept["loss"] + 3 * kept["square"].sum()).backward()
    # d(2 w² + 18 sin w + 3 w²) with z* = 18 fixed in the auxiliary loss
    assert w.grad.item() == pytest.approx(30 + 18 * torch.cos(w).item())


@BOTH
def test_a_second_backward_pass_needs_retain_graph(options):
    w = scalar(3.0)
    value = solved(lambda z: 0.5 * z + w**2, options=options)
    value.sum().backward(retain_graph=True)
    value.sum().backward()
    assert w.grad.item() == pytest.approx(24.0)
    with pytest.raises(RuntimeError, match="second time"):
        value.sum().backward()


class Holds(torch.autograd.Function):
    """Identity whose node refers to an object."""

    @staticmethod
    def forward(ctx, x, held):
        ctx.held = held
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g, None


@BOTH
def test_the_graph_of_f_is_freed_by_the_backward_pass(options):
    w, kept = scalar(3.0), {}

    def f(z):
        held = nn.Identity()
        kept["last"] = weakref.ref(held)
        return Holds.apply(0.5 * z + w, held)

    value = solved(f, options=options)
    gc.collect()
    assert kept["last"]() is not None
    value.sum().backward()
    assert kept["last"]() is None
    assert value.grad_fn is not None


@BOTH
def test_only_the_gradients_asked_for_are_formed(options):
    w, v, counts = scalar(3.0), scalar(2.0), {}
    x = v * 1.0
    value = solved(lambda z, x: 0.5 * z + Count.apply(w * 1.0, counts, "w") * x, x, options=options)
    (part,) = torch.autograd.grad(value.sum(), v, retain_graph=True)
    assert part.item() == pytest.approx(6.0)
    assert "w" not in counts
    (part,) = torch.autograd.grad(value.sum(), w, retain_graph=True)
    assert part.item() == pytest.approx(4.0)
    assert counts["w"] == 1
    value.sum().backward(inputs=[w])
    assert w.grad.item() == pytest.approx(4.0)
    assert v.grad is None


@BOTH
def test_sparse_gradients_stay_sparse(options):
    table = nn.Embedding(50, 1, sparse=True, dtype=torch.float64)
    value = solved(lambda z: 0.5 * z + table(torch.tensor([7])), options=options)
    value.sum().backward()
    gradient = table.weight.grad
    assert gradient.is_sparse
    assert gradient.to_dense()[7].item() == pytest.approx(2.0)
    assert gradient.to_dense().count_nonzero() == 1


def test_a_parameter_that_no_derivative_reads_may_be_written_to():
    w = scalar(3.0)
    value = solved(lambda z: 0.5 * z + w, options=NEUMANN)
    with torch.no_grad():
        w.add_(1.0)
    value.sum().backward()
    assert w.grad.item() == pytest.approx(2.0)


def test_attributes_of_an_argument_reach_f():
    x = scalar(3.0) * 1.0
    x.factor = 2.0
    value = solved(lambda z, x: 0.5 * z + x.factor * x, x)
    (part,) = torch.autograd.grad(value.sum(), x)
    assert part.item() == pytest.approx(4.0)


def test_a_gradient_that_may_not_be_differentiated_again_is_right_with_create_graph():
    w = scalar(3.0)
    value = solved(lambda z: 0.5 * z + w**2, options=NEUMANN)
    (part,) = torch.autograd.grad(value.sum(), w, create_graph=True)
    assert part.item() == pytest.approx(12.0)
    with pytest.raises(Exception, match="approximates the gradient"):
        torch.autograd.grad(part.sum(), w)
